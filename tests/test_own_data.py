"""Own images and labels: other sizes and depths, images in a file, large images, real numbers as labels."""

import json
import os
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from extras import needs

needs("nni", "sklearn")

import timm
from PIL import Image
from report_runs import make_history, make_retrain, write_run
from torchvision.transforms import v2

from nni_spaces import HBSpace
from nni_spaces.runs.callback import describe_images
from nni_spaces.runs.data import ImageSet, SeededImages, channel_moments, make_loaders, read_images
from nni_spaces.runs.image_files import Form
from nni_spaces.runs.retrain import make_model, retrain
from nni_spaces.runs.search import make_space, search
from nni_spaces.runs.settings import RetrainSettings, SearchSettings
from optinspired_plugins.next_steps import retrain_command
from optinspired_plugins.report.page import write_report
from optinspired_plugins.run_folder import read_history

RNG = np.random.default_rng(0)
SKIP = [["skip_connect", 1], ["avg_pool_3x3", 1], ["skip_connect", 0]]
GENOTYPE = {"version": 1, "rule": "hb", "normal": [SKIP], "reduction": [SKIP]}
TINY = dict(epochs=1, cells=3, channels=2, batch_size=4, padding=0)


def noise(*shape, kind=np.uint8):
    return RNG.integers(0, np.iinfo(kind).max + 1, shape, kind)


def write_images(root, images, suffix="png"):
    """Write PIL's images in turns to two classes."""
    for i, image in enumerate(images):
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.{suffix}")
    return root


# --- size -------------------------------------------------------------------------------------------------------------


def test_images_of_several_sizes_become_squares(tmp_path):
    shapes = [(20, 10), (10, 20), (12, 12), (40, 11)]
    pictures = [noise(*shape, 3) for shape in shapes]
    write_images(tmp_path, map(Image.fromarray, pictures))
    found = read_images(tmp_path, resize=10)
    assert (found.images.shape, found.images.dtype) == ((4, 3, 10, 10), torch.uint8)
    transform = v2.Compose([v2.Resize(10, antialias=True), v2.CenterCrop(10)])
    for picture in pictures:
        expected = transform(torch.from_numpy(picture).permute(2, 0, 1))
        assert (found.images == expected).flatten(1).all(1).sum() == 1
    with pytest.raises(ValueError, match=r"must have one size, or resize them"):
        read_images(tmp_path)


def test_every_source_is_resized(tmp_path):
    images = noise(4, 9, 12, 3)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(4) % 2)
    expected = v2.functional.resize(torch.from_numpy(images).permute(0, 3, 1, 2), [6], antialias=True)[..., 1:7]
    assert torch.equal(read_images(tmp_path / "a.npz", resize=6).images, expected)
    assert read_images("digits", 20, resize=16).images.shape == (20, 1, 16, 16)
    assert torch.equal(read_images("digits", 20, resize=8).images, read_images("digits", 20).images)
    with pytest.raises(ValueError, match="resize=0: must be an integer ≥ 1"):
        read_images("digits", resize=0)


# --- depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "pgm", "tif"])
def test_16_bits_are_kept(suffix, tmp_path):
    values = noise(4, 6, kind=np.uint16)
    write_images(tmp_path, [Image.frombytes("I;16", (6, 4), values.tobytes())] * 2, suffix)
    found = read_images(tmp_path, keep_depth=True)
    assert (found.images.dtype, found.white) == (torch.uint16, 65535)
    assert (found.images.numpy() == values).all()
    assert read_images(tmp_path).images.dtype == torch.uint8


def test_floating_point_is_kept(tmp_path):
    values = RNG.random((4, 6), np.float32)
    write_images(tmp_path, [Image.fromarray(values)] * 2, "tif")
    found = read_images(tmp_path, keep_depth=True)
    assert (found.images.dtype, found.white) == (torch.float32, 1)
    assert (found.images.numpy() == values).all()
    with pytest.raises(ValueError, match=r"mode='F': must be grey .*, or floating point with keep_depth"):
        read_images(tmp_path)
    write_images(tmp_path, [Image.fromarray(2 * values)], "tif")
    with pytest.raises(ValueError, match="mode='F': has values outside of 0 to 1, must be black at 0 and white at 1"):
        read_images(tmp_path, keep_depth=True)


def test_images_of_two_depths_are_named(tmp_path):
    write_images(tmp_path, [Image.fromarray(noise(4, 6)), Image.frombytes("I;16", (6, 4), bytes(48))])
    assert read_images(tmp_path).images.dtype == torch.uint8
    with pytest.raises(ValueError, match=r"images of uint8 \(.*0.png'\) and uint16 \(.*1.png'\), must have one depth"):
        read_images(tmp_path, keep_depth=True)


@pytest.mark.parametrize("kind", ["uint16", "float16", "float32", "float64"])
def test_arrays_of_other_depths_are_read_if_they_are_asked_for(kind, tmp_path):
    images = noise(4, 6, 5, 1, kind=np.uint16) if kind == "uint16" else RNG.random((4, 6, 5, 1)).astype(kind)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(4) % 2)
    found = read_images(tmp_path / "a.npz", keep_depth=True)
    assert found.images.dtype == (torch.uint16 if kind == "uint16" else torch.float32)
    assert (found.images[:, 0].numpy() == images[..., 0].astype(found.images.numpy().dtype)).all()
    with pytest.raises(ValueError, match=rf"x_train is {kind} of shape .* must be uint8 of"):
        read_images(tmp_path / "a.npz")


@pytest.mark.parametrize("wrong", [1.5, -0.1, np.nan, np.inf])
def test_floating_point_without_a_range_is_refused(wrong, tmp_path):
    images = np.full((4, 6, 5, 1), 0.5)
    images[1, 2, 3] = wrong
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(4) % 2)
    with pytest.raises(ValueError, match="x_train: has values outside of 0 to 1"):
        read_images(tmp_path / "a.npz", keep_depth=True)


def test_a_depth_reaches_training_and_its_record(tmp_path):
    images = RNG.random((8, 9, 9, 1))
    np.savez(
        tmp_path / "a.npz",
        **{
            f"{name}_{part}": value
            for part in ("train", "test")
            for name, value in (("x", images), ("y", np.arange(8) % 2))
        },
    )
    settings = RetrainSettings(genotype=GENOTYPE, data=str(tmp_path / "a.npz"), keep_depth=True, resize=8, **TINY)
    retrain(settings, tmp_path / "run", accelerator="cpu")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    resized = read_images(tmp_path / "a.npz", keep_depth=True, resize=8).images
    assert about["mean"] == [pytest.approx(float(resized.mean()), abs=1e-5)]
    assert about["std"] == [pytest.approx(float(resized.std()), abs=1e-5)]
    assert about["data"]["height"] == 8


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 1, 8, 8), (700, 3, 5, 7), (2, 2, 300, 200)])
@pytest.mark.parametrize("high", [2, 256])
def test_moments_are_those_of_all_pixels_to_the_bit(shape, high):
    images = torch.randint(0, high, shape, generator=torch.Generator().manual_seed(high)).to(torch.uint8)
    mean, std = channel_moments(images)
    channels = images.unbind(1)
    assert mean == [float(c.float().mean(dtype=torch.float64)) for c in channels]
    assert std == [float(c.float().std()) for c in channels]


def test_moments_of_other_depths():
    wide = torch.from_numpy(noise(5, 2, 9, 9, kind=np.uint16))
    exact = torch.from_numpy(RNG.random((5, 2, 9, 9), np.float32))
    for images in (wide, exact):
        mean, std = channel_moments(images)
        channels = [c.double() for c in images.unbind(1)]
        assert mean == pytest.approx([float(c.mean()) for c in channels], rel=1e-12)
        assert std == pytest.approx([float(c.std()) for c in channels], rel=1e-6)


# --- a file instead of memory -----------------------------------------------------------------------------------------


def test_images_in_a_file_are_the_same_and_the_file_has_no_name(tmp_path):
    pictures = [noise(6, 5), noise(6, 5, 3), noise(6, 5), noise(6, 5)]  # the first is grey
    write_images(tmp_path / "images", map(Image.fromarray, pictures))
    store = tmp_path / "store"
    store.mkdir()
    plain, stored = (read_images(tmp_path / "images", store=place) for place in (None, store))
    assert torch.equal(plain.images, stored.images)
    assert (list(store.iterdir()), describe_images(stored)) == ([], describe_images(plain))
    for a, b in zip(make_loaders(plain, 2, 0), make_loaders(stored, 2, 0)):
        assert all(torch.equal(x, y) for pair in zip(a, b) for x, y in zip(*pair))


@pytest.mark.parametrize(("on_disk", "least", "most"), [(False, 0.95, 1.5), (True, 0.0, 0.4)])
def test_a_folder_is_in_memory_once_or_not_at_all(on_disk, least, most, tmp_path):
    """Python counts the arrays of NumPy, and so not the pages of a file."""
    write_images(tmp_path / "images", [Image.fromarray(noise(64, 64, 3)) for _ in range(100)], "bmp")
    store = tmp_path if on_disk else None
    read_images(tmp_path / "images", 2, store=store)  # imports
    tracemalloc.start()
    found = read_images(tmp_path / "images", store=store)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert least < peak / found.images.nbytes < most


def test_images_in_a_file_may_be_more_than_memory_holds(tmp_path, monkeypatch):
    write_images(tmp_path, [Image.fromarray(noise(16, 16))] * 2)
    monkeypatch.setattr("nni_spaces.runs.image_sources.LIMIT_BYTES", 511)
    assert len(read_images(tmp_path, store=tmp_path).labels) == 2
    with pytest.raises(ValueError, match="has 2 images of 16 × 16, must have at most 511 bytes"):
        read_images(tmp_path)


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path, monkeypatch):
    asked = []

    def full(descriptor, start, size):
        asked.append(size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Form(store=tmp_path).empty((2, 3, 4, 5), np.dtype(np.uint16))
    assert asked == [2 * 3 * 4 * 5 * 2]


def test_a_search_of_images_in_a_file_is_the_same(tmp_path):
    write_images(tmp_path / "images", [Image.fromarray(noise(9, 9)) for _ in range(16)])
    settings = SearchSettings(data=str(tmp_path / "images"), nodes=1, **TINY)
    for name, on_disk in (("memory", False), ("disk", True)):
        search(settings, tmp_path / name, accelerator="cpu", on_disk=on_disk)
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("memory", "disk")]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name])
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {p.name for p in (tmp_path / "memory").iterdir()}


# --- flips, large images ----------------------------------------------------------------------------------------------


def test_flips_can_be_switched_off():
    image = torch.arange(144, dtype=torch.uint8).reshape(1, 1, 12, 12)
    data = ImageSet(image, torch.zeros(1, dtype=torch.int64), 2)
    for flip, expected in ((True, {True, False}), (False, {False})):
        served = SeededImages(data, padding=1, flip=flip)
        assert {bool(served[epoch, 0][0][0, 6, 4] > served[epoch, 0][0][0, 6, 7]) for epoch in range(20)} == expected


def test_flips_reach_the_halves_of_a_search():
    data = read_images("digits", 20, resize=9)
    for flip in (True, False):
        assert all(loader.dataset.flip == flip for loader in make_loaders(data, 2, 0, flip=flip))


def test_large_images_have_a_stem_in_search_and_network():
    settings = SearchSettings(stem="imagenet", channels=4, cells=3, nodes=1)
    space = make_space(settings, 2, 3)
    assert space.stem == "imagenet"
    assert space.stem1(space.stem0(torch.zeros(2, 3, 64, 64))).shape == (2, 4, 8, 8)
    command = retrain_command("a.json", dict(stem="imagenet", flip=False, resize=64, keep_depth=True))
    assert command.endswith("a.json --resize 64 --keep-depth --no-flip --model cellnet_imagenet")
    trained = RetrainSettings(genotype=GENOTYPE, model="cellnet_imagenet", cells=3, channels=4)
    assert make_model(trained, 2, 3).stem1(make_model(trained, 2, 3).stem0(torch.zeros(2, 3, 64, 64))).shape[-1] == 8
    with pytest.raises(ValueError, match="stem='large': must be one of cifar, imagenet"):
        SearchSettings(stem="large")


# --- real numbers as labels -------------------------------------------------------------------------------------------


@pytest.fixture
def targets(tmp_path):
    """Images, and their mean as label."""
    arrays = {}
    for part, count in (("train", 16), ("test", 8)):
        arrays[f"x_{part}"] = noise(count, 8, 8, 1)
        arrays[f"y_{part}"] = arrays[f"x_{part}"].mean((1, 2, 3)) / 255
    np.savez(tmp_path / "a.npz", **arrays)
    return str(tmp_path / "a.npz"), arrays


def test_labels_are_real_numbers_if_they_are_asked_for(targets, tmp_path):
    source, arrays = targets
    found = read_images(source, 10, regression=True)
    assert (found.classes, found.labels.dtype, len(found.labels)) == (1, torch.float32, 10)
    assert (found.labels.numpy() == arrays["y_train"][:10].astype(np.float32)).all()
    served = SeededImages(found)
    assert served[0, 3][1] == found.labels[3]
    with pytest.raises(ValueError, match=r"y_train is float64 of shape .* must be integers ≥ 0"):
        read_images(source)
    with pytest.raises(ValueError, match=r"regression=True with data='digits': must be an \.npz file"):
        read_images("digits", regression=True)
    for wrong in (np.full(16, np.nan), np.zeros((16, 1)), np.array(["a"] * 16)):
        np.savez(tmp_path / "b.npz", **{**arrays, "y_train": wrong})
        with pytest.raises(ValueError, match=r"y_train is .* must be finite numbers of shape \(16,\)"):
            read_images(tmp_path / "b.npz", regression=True)


def test_one_output_is_searched_and_trained(targets, tmp_path):
    source, arrays = targets
    settings = SearchSettings(data=source, regression=True, nodes=1, **TINY)
    search(settings, tmp_path / "search", accelerator="cpu")
    (entry,) = read_history(tmp_path / "search")
    assert entry["train_loss"] > 0 < entry["alpha_loss"]
    assert entry["train_top1"] is entry["alpha_top1"] is None
    settings = RetrainSettings(genotype=GENOTYPE, data=source, regression=True, **TINY)
    lowest = retrain(settings, tmp_path / "retrain", accelerator="cpu", metric=lambda output, label: -output.min())
    (entry,) = read_history(tmp_path / "retrain")
    assert (lowest, entry["test_top1"]) == (entry["test_loss"], None)
    model = timm.create_model(
        "cellnet_cifar", genotype=GENOTYPE, cells=3, channels=2, in_chans=1, num_classes=1,
        checkpoint_path=tmp_path / "retrain" / "model.safetensors",
    ).eval()  # fmt: skip
    about = json.loads((tmp_path / "retrain" / "run.json").read_text())
    images = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        output = model((images - about["mean"][0]) / about["std"][0])
    assert output.shape == (8, 1)
    expected = ((output[:, 0].double() - torch.from_numpy(arrays["y_test"])) ** 2).mean()
    assert lowest == pytest.approx(float(expected), rel=1e-3)
    assert entry["test_metric"] == pytest.approx(float(-output.min()), abs=1.0)


def without_accuracy(entries):
    return [{name: None if name.endswith("top1") else value for name, value in entry.items()} for entry in entries]


@pytest.mark.parametrize("is_retrained", [False, True])
def test_a_report_shows_the_loss_where_there_is_no_accuracy(is_retrained, tmp_path):
    retrained = make_retrain()
    retrained["history"] = without_accuracy(retrained["history"])
    run = write_run(
        tmp_path, without_accuracy(make_history("hb", 2, nodes=1)), retrain=retrained if is_retrained else None
    )
    page = write_report(run).read_text(encoding="utf-8")
    part = "retrained network on the test images, epoch 3" if is_retrained else "supernet on α's half .*, epoch 2"
    value = "0.4" if is_retrained else r"2\.1\d+"
    assert re.search(rf">{value}<.*Loss of the {part}, the last; labels are real numbers", page, re.DOTALL)
    assert "Top-1 accuracy of the retrained" not in page


def test_an_own_loss_and_metric_reach_both(tmp_path):
    shapes = []

    def loss(logits, labels):
        shapes.append((tuple(logits.shape), labels.dtype))
        return torch.nn.functional.multi_margin_loss(logits, labels)

    def metric(logits, labels):
        assert not logits.requires_grad
        return torch.tensor(-2.5)

    settings = SearchSettings(data="digits", limit=40, nodes=1, **TINY)
    search(settings, tmp_path / "search", accelerator="cpu", loss=loss, metric=metric)
    (entry,) = read_history(tmp_path / "search")
    assert (entry["train_metric"], entry["alpha_metric"]) == (-2.5, -2.5)
    assert set(shapes) == {((4, 10), torch.int64)}
    assert entry["train_top1"] is not None
    shapes.clear()
    settings = RetrainSettings(genotype=GENOTYPE, data="digits", limit=40, cutout=0, **TINY)
    retrain(settings, tmp_path / "retrain", accelerator="cpu", loss=loss, metric=metric)
    assert len(shapes) == 20
    assert read_history(tmp_path / "retrain")[0]["test_metric"] == -2.5


def test_a_space_has_one_output():
    space = HBSpace(channels=4, cells=3, nodes=1, num_classes=1)
    assert space.fc.out_features == 1
    with pytest.raises(ValueError, match="num_classes=0: must be an integer ≥ 1"):
        HBSpace(channels=4, cells=3, nodes=1, num_classes=0)


@pytest.mark.parametrize("kind", [SearchSettings, lambda **o: RetrainSettings(genotype=GENOTYPE, **o)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(resize=0), "resize=0: must be an integer ≥ 1"),
        (dict(flip=1), "flip=1: must be True or False"),
        (dict(keep_depth="yes"), "keep_depth='yes': must be True or False"),
        (dict(regression=None), "regression=None: must be True or False"),
    ],
)
def test_wrong_settings_are_named(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)


def test_settings_that_an_older_run_lacks_have_their_defaults():
    for kind in (SearchSettings(), RetrainSettings(genotype=GENOTYPE)):
        assert kind == replace(kind, resize=None, keep_depth=False, flip=True, regression=False, label_smoothing=0.0)
