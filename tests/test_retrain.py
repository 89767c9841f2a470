"""Retraining: §9.3's recipe, resumable to the bit, and a network that timm takes."""

import json
import multiprocessing
import random
import shutil
import signal
from dataclasses import fields, replace

import numpy as np
import pytest
import timm
import torch
from extras import needs

needs("nni", "sklearn")

import search_runs
from safetensors.torch import load_file
from test_nni_search import differences

from nni_spaces.runs.callback import describe_images
from nni_spaces.runs.data import EpochSampler, ImageSet, read_images, read_run_images
from nni_spaces.runs.retrain import RetrainModule, _loaders, make_model, retrain
from nni_spaces.runs.settings import RetrainSettings
from optinspired_plugins.run_folder import read_history

HB = {
    "version": 1,
    "rule": "hb",
    "normal": [[["sep_conv_3x3", 1], ["max_pool_3x3", 1], ["neg_skip_connect", 0]]],
    "reduction": [[["max_pool_3x3", 1], ["skip_connect", 1], ["dil_conv_3x3", 0]]],
}
TINY = dict(
    genotype=HB, data="digits", limit=96, epochs=3, cells=3, channels=2, batch_size=16, lr=0.1, aux_weight=0, cutout=2,
    padding=1, drop_path_rate=0.3,
)  # fmt: skip
BATCHES = 3 * 6

processes = multiprocessing.get_context("forkserver")


def run(folder, settings=TINY, **kwargs):
    process = processes.Process(target=search_runs.run, args=(folder, settings), kwargs=dict(kwargs, retraining=True))
    process.start()
    process.join(300)
    return process.exitcode


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def without_times(folder):
    return [{k: v for k, v in entry.items() if k not in ("seconds", "resumed")} for entry in read_history(folder)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrain")
    assert run(folder) == 0
    return folder


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers():
    """§9.3: 20 cells, 36 channels, 600 epochs, batches of 96, cutout, path dropout .2, auxiliary heads .4."""
    found = {f.name: f.default for f in fields(RetrainSettings)}
    papers = dict(
        data="cifar10", model="cellnet_cifar", epochs=600, batch_size=96, cells=20, channels=36, lr=0.025, momentum=0.9,
        weight_decay=3e-4, gradient_clip=5.0, aux_weight=None, drop_path_rate=0.2, cutout=None, padding=4,
    )  # fmt: skip
    assert {name: found[name] for name in papers} == papers


@pytest.mark.parametrize(("shape", "side"), [((32, 32), 16), ((8, 8), 4), ((6, 9), 3), ((1, 1), 0)])
def test_half_of_the_side_is_cut_out_by_default(shape, side):
    """§9.3's cutout is 16 of 32."""
    data = ImageSet(torch.zeros(32, 1, *shape, dtype=torch.uint8), torch.arange(32) % 2, 2)
    loader, _ = _loaders(data, data, RetrainSettings(**{**TINY, "cutout": None}), 0, 1, 0)
    assert loader.dataset.cutout == side


class Epoch:
    """What a module asks a trainer for."""

    def __init__(self, epoch):
        self.current_epoch = epoch


def module_in_epoch(epoch, **settings):
    settings = RetrainSettings(**{**TINY, "epochs": 10, **settings})
    module = RetrainModule(make_model(settings, 10, 1, aux_head=settings.aux_weight > 0), settings)
    sgd = module.configure_optimizers()
    module._trainer = Epoch(epoch)
    module.on_train_epoch_start()
    module.log = lambda *args, **kwargs: None
    return module, sgd


@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_learning_rate_and_drop_rate_are_functions_of_the_epoch(epoch):
    module, sgd = module_in_epoch(epoch)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + np.cos(np.pi * epoch / 10)))
    assert sgd.param_groups[0]["momentum"] == 0.9
    assert sgd.param_groups[0]["weight_decay"] == 3e-4
    drops = {cell.drop_path.drop_prob for cell in module.model.cells}
    assert drops == {0.3 * epoch / 10}


def test_the_auxiliary_loss_is_added_with_its_weight():
    images, labels = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 3])
    module, _ = module_in_epoch(0, aux_weight=0.4)
    loss = module.training_step((images, labels), 0)
    logits, auxiliary = module.model(images)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    expected = expected + 0.4 * torch.nn.functional.cross_entropy(auxiliary, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert module.model.aux_head.fc.weight.grad.abs().sum() > 0


def test_images_are_loaded_by_the_settings_and_test_images_as_training_images_are():
    settings = RetrainSettings(**{**TINY, "cutout": 4, "padding": 3, "resize": 9, "flip": False})
    data, test = (read_run_images(settings, split) for split in ("train", "test"))
    assert data.images.shape == test.images.shape == (96, 1, 9, 9)
    training, testing = (loader.dataset for loader in _loaders(data, test, settings, 0, 1, 0))
    assert (training.cutout, training.padding, testing.cutout, testing.padding) == (4, 3, 0, 0)
    assert (training.flip, testing.flip) == (False, True), "images that are not cropped are not flipped"
    assert torch.equal(testing.mean, training.mean)
    assert torch.equal(testing.std, training.std)


def test_gradients_are_clipped_by_the_settings(tmp_path, monkeypatch):
    class Made(Exception):
        pass

    def trainer(**options):
        raise Made(options["gradient_clip_val"])

    monkeypatch.setattr("nni_spaces.runs.retrain.pl.Trainer", trainer)
    with pytest.raises(Made) as caught:
        retrain(RetrainSettings(**{**TINY, "gradient_clip": 0.3}), tmp_path)
    assert caught.value.args == (0.3,)


# --- the same result --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_is_the_uninterrupted_training(uninterrupted, tmp_path):
    rng = random.Random(1)
    kills = [dict(kill_at=rng.randint(1, BATCHES)), dict(kill_at=7, workers=2), dict(kill_in_save=3)]
    for i, kill in enumerate(kills):
        folder = tmp_path / str(i)
        assert run(folder, **kill) == -signal.SIGKILL
        assert not (folder / "model.safetensors").exists()
        assert run(folder, workers=2 * (i == 0)) == 0
        assert differences(checkpoint(folder), checkpoint(uninterrupted)) == []
        assert without_times(folder) == without_times(uninterrupted)
        assert (folder / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    resumed = [entry["resumed"] for entry in read_history(tmp_path / "1")]
    assert resumed == [False, True, False]


@pytest.mark.slow
def test_it_learns_and_what_it_writes_is_what_timm_validates(uninterrupted):
    """The accuracy in the history is that of the weights file, in timm's model, on the images of the test part."""
    history = read_history(uninterrupted)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    facts = json.loads((uninterrupted / "run.json").read_text())
    (uninterrupted / "genotype.json").write_text(json.dumps(HB))
    model = timm.create_model(
        "cellnet_cifar", genotype=str(uninterrupted / "genotype.json"), cells=3, channels=2, in_chans=1,
        checkpoint_path=str(uninterrupted / "model.safetensors"),
    ).eval()  # fmt: skip
    test = read_images("digits", 96, "test")
    images = (test.images.float() / 255 - facts["mean"][0]) / facts["std"][0]
    with torch.no_grad():
        top1 = (model(images).argmax(1) == test.labels).float().mean()
    assert 100 * top1 == pytest.approx(history[-1]["test_top1"], abs=0.01)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["data"]["images"] == 96


@pytest.mark.slow
def test_a_finished_training_is_not_repeated(uninterrupted):
    written = (uninterrupted / "checkpoint.pt").stat().st_mtime_ns
    top1 = retrain(RetrainSettings(**TINY), uninterrupted, accelerator="cpu")
    assert top1 == read_history(uninterrupted)[-1]["test_top1"]
    assert (uninterrupted / "checkpoint.pt").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_training_killed_before_its_weights_are_written_gets_them(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "model.safetensors").unlink()
    retrain(RetrainSettings(**TINY), folder, accelerator="cpu")
    assert (folder / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_with_the_auxiliary_head_the_file_holds_the_plain_network(tmp_path):
    rng = np.random.default_rng(0)
    parts = {"train": 8, "test": 4}
    arrays = {f"x_{part}": rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in parts.items()}
    arrays |= {f"y_{part}": np.arange(n) % 2 for part, n in parts.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    settings = dict(
        TINY, data=str(tmp_path / "a.npz"), limit=None, epochs=1, batch_size=4, aux_weight=None, cutout=None
    )
    retrain(RetrainSettings(**settings), tmp_path / "run", accelerator="cpu")
    asked, made = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("settings", "run"))
    assert asked["aux_weight"] == 0.4  # 32 × 32: §9.3's
    assert (asked["cutout"], made["cutout"]) == (None, 16)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    plain = make_model(RetrainSettings(**settings), 2, 3)
    plain.load_state_dict(weights)
    assert "aux_head.fc.weight" in {name.removeprefix("model.") for name in checkpoint(tmp_path / "run")["state_dict"]}


# --- the images -------------------------------------------------------------------------------------------------------


def test_the_digits_of_both_parts_are_disjoint_and_all():
    train, test = read_images("digits"), read_images("digits", split="test")
    assert (len(train.labels), len(test.labels)) == (1442, 355)
    assert np.bincount(test.labels).min() >= 34
    rows = {image.numpy().tobytes() for image in (*train.images, *test.images)}
    assert len(rows) == 1797


@pytest.mark.parametrize("part", ["test", "val", "validation"])
def test_test_images_of_arrays_and_folders(part, tmp_path):
    from PIL import Image

    for name, value in (("train", 10), (part, 200)):
        for label in "ab":
            (tmp_path / name / label).mkdir(parents=True)
            Image.new("L", (8, 8), value).save(tmp_path / name / label / "0.png")
    assert read_images(tmp_path).images.unique().tolist() == [10]
    assert read_images(tmp_path, split="test").images.unique().tolist() == [200]


def test_sources_without_test_images(tmp_path):
    (tmp_path / "folder" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no test images, must have a folder test or val or validation"):
        read_images(tmp_path / "folder", split="test")
    np.savez(tmp_path / "a.npz", x_train=np.zeros((2, 8, 8, 1), np.uint8), y_train=np.arange(2))
    with pytest.raises(ValueError, match="has no array x_test, must have x_test and y_test"):
        read_images(tmp_path / "a.npz", split="test")
    with pytest.raises(ValueError, match="split='val': must be 'train' or 'test'"):
        read_images("digits", split="val")


def test_processes_share_an_epoch_without_overlap(monkeypatch):
    def part(rank, seed):
        monkeypatch.setenv("RANK", str(rank))
        sampler = EpochSampler(11, seed, 2)
        assert len(sampler) == len(list(sampler))
        return [index for _, index in sampler]

    first, second = part(0, 5), part(1, 5)
    assert len(first) == len(second) == 5
    assert len({*first, *second}) == 10
    whole = [index for _, index in EpochSampler(11, 5)]
    assert whole[:10:2] == first
    assert sorted(part(0, None) + part(1, None)) == list(range(11)), "no test image is left out"


# --- what does not go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(genotype={**HB, "rule": "sgd"}), "rule='sgd': must be one of"),
        (dict(model="resnet50"), "model='resnet50': must be one of cellnet_cifar, cellnet_imagenet"),
        (dict(epochs=0), "epochs=0: must be an integer ≥ 1"),
        (dict(batch_size=1), "batch_size=1: must be an integer ≥ 2"),
        (dict(lr=float("inf")), "lr=inf: must be a positive number"),
        (dict(cutout=-1), "cutout=-1: must be an integer ≥ 0"),
        (dict(drop_path_rate=1.0), r"drop_path_rate=1.0: must be in \[0, 1\)"),
        (dict(aux_weight=-0.1), "aux_weight=-0.1: must be ≥ 0"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RetrainSettings(**{**TINY, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(aux_weight=0.4), "auxiliary head of cellnet_cifar takes 32 × 32 and data='digits' has images of 8 × 8"),
        (dict(cutout=8), "cutout=8: must be less than 8, or it covers an image of 8 × 8"),
        (dict(batch_size=97), "batch_size=97: must be at most 96, the images of a process"),
        (dict(cells=2), "cells=2: must be an integer ≥ 3"),
    ],
)
def test_what_a_training_refuses(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        retrain(RetrainSettings(**{**TINY, **change}), tmp_path)


def test_refused_settings_do_not_bind_the_folder(tmp_path):
    class Started(Exception):
        pass

    def on_batch():
        raise Started

    for batch_size, error in ((97, ValueError), (16, Started)):
        settings = RetrainSettings(**{**TINY, "batch_size": batch_size})
        with pytest.raises(error):
            retrain(settings, tmp_path, accelerator="cpu", on_batch=on_batch)
    assert json.loads((tmp_path / "settings.json").read_text())["batch_size"] == 16


def test_training_and_test_images_must_be_alike(tmp_path):
    arrays = dict(x_train=np.zeros((8, 8, 8, 1), np.uint8), y_train=np.arange(8) % 4)
    for change, message in (
        (dict(y_test=np.arange(8)), "y_test has the label 7, must be 0 … 3, as y_train"),
        (
            dict(x_test=np.zeros((8, 9, 8, 1), np.uint8)),
            r"images are \(1, 8, 8\) and \(1, 9, 8\): must be of one shape",
        ),
    ):
        np.savez(tmp_path / "a.npz", **arrays, **{**dict(x_test=arrays["x_train"], y_test=arrays["y_train"]), **change})
        with pytest.raises(ValueError, match=message):
            retrain(RetrainSettings(**{**TINY, "data": str(tmp_path / "a.npz")}), tmp_path / "run")
    for name in ("train/cat", "train/dog", "train/eel", "val/cat", "val/eel"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"val'.*has other class folders than train, must have the same"):
        read_images(tmp_path, split="test")


@pytest.mark.slow
def test_a_folder_of_another_training_or_of_other_images_is_refused(uninterrupted):
    other = json.loads(json.dumps(HB).replace("max_pool", "avg_pool"))
    with pytest.raises(ValueError, match=r"holds a run with genotype=.*avg_pool.*: choose another folder"):
        retrain(RetrainSettings(**{**TINY, "genotype": other}), uninterrupted)
    facts = (uninterrupted / "run.json").read_text()
    digest = json.loads(facts)["data"]["sha256"]
    try:
        (uninterrupted / "run.json").write_text(facts.replace(digest, "0" * 64))
        with pytest.raises(ValueError, match="holds a run on other images than data='digits' has now"):
            retrain(RetrainSettings(**TINY), uninterrupted)
    finally:
        (uninterrupted / "run.json").write_text(facts)


def test_the_hash_of_the_images_decides_and_not_their_name(tmp_path):
    """Images may be moved, and go on where a run began with them; others under their name do not."""
    source, moved, run = tmp_path / "a.npz", tmp_path / "moved.npz", tmp_path / "run"
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    arrays = dict(x_train=images, y_train=np.arange(8) % 4, x_test=images, y_test=np.arange(8) % 4)
    np.savez(source, **arrays)
    settings = RetrainSettings(**{**TINY, "data": str(source), "limit": None, "epochs": 1, "batch_size": 4})
    top1 = retrain(settings, run, accelerator="cpu")
    source.rename(moved)
    settings = replace(settings, data=str(moved))
    assert retrain(settings, run, accelerator="cpu") == top1
    assert json.loads((run / "settings.json").read_text())["data"] == str(moved), "the report names it again"
    for change in (
        dict(x_train=images[::-1]),
        dict(x_train=images.reshape(8, 4, 16, 1), x_test=images.reshape(8, 4, 16, 1)),
    ):
        np.savez(moved, **{**arrays, **change})
        with pytest.raises(ValueError, match=r"holds a run on other images than data='.*moved\.npz' has now"):
            retrain(settings, run, accelerator="cpu")
    np.savez(moved, **arrays)
    np.savez(source, **arrays)
    (run / "run.json").unlink()  # nothing but the name is known then
    with pytest.raises(ValueError, match=r"holds a run with data='.*moved\.npz' \(here '.*a\.npz'\)"):
        retrain(replace(settings, data=str(source)), run, accelerator="cpu")


def test_the_hash_tells_apart_whatever_a_run_takes_from_images():
    data = ImageSet(torch.arange(96, dtype=torch.uint8).reshape(2, 3, 4, 4), torch.tensor([0, 1]), 2)
    others = [
        data._replace(images=data.images.reshape(2, 3, 2, 8)),
        data._replace(images=data.images.flip(1)),
        data._replace(images=data.images.permute(0, 1, 3, 2)),
        data._replace(images=data.images.view(torch.int8)),
        data._replace(labels=data.labels.flip(0)),
        data._replace(classes=3),
    ]
    hashes = [describe_images(found)["sha256"] for found in (data, *others)]
    assert len(set(hashes)) == len(hashes)
    assert describe_images(data._replace(images=data.images.clone()))["sha256"] == hashes[0]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_names_epoch_and_step(tmp_path, monkeypatch):
    plain, calls = torch.nn.functional.cross_entropy, []

    def poisoned(logits, labels, **options):
        calls.append(logits.requires_grad)
        return plain(logits, labels) * (float("nan") if sum(calls) == 6 + 2 and logits.requires_grad else 1)

    monkeypatch.setattr("nni_spaces.runs.objective.F.cross_entropy", poisoned)
    with pytest.raises(FloatingPointError, match=r"loss=nan in epoch 2, step 2: must be finite"):
        retrain(RetrainSettings(**TINY), tmp_path, accelerator="cpu")
    assert checkpoint(tmp_path)["epoch"] == 0
