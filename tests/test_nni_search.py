"""Searches: reproducible, resumable to the bit after SIGKILL, and clear about what they refuse."""

import errno
import json
import multiprocessing
import os
import random
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("nni", reason="the extra 'nni' is not installed")
pytest.importorskip("sklearn", reason="the extra 'viz', which brings the digits, is not installed")

import search_runs
from nni.nas.evaluator.pytorch import Classification
from nni.nas.experiment import NasExperiment
from nni.nas.oneshot.pytorch.differentiable import DartsLightningModule
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import GumbelDARTS as StockGumbelDARTS
from nni.nas.strategy import RandomOneShot
from PIL import Image

from nni_spaces import DARTS, AGDSpace, DARTSSpace, GumbelDARTS, HBSpace, HeavyBallInit, ZeroInit
from nni_spaces.data import EpochSampler, ImageSet, SeededImages, make_loaders, read_images
from nni_spaces.run_folder import locked, read_history
from nni_spaces.search import SearchModule, SearchSettings, search
from optinspired_plugins import Genotype

TINY = dict(
    data="digits", limit=96, epochs=3, channels=2, cells=3, nodes=2, batch_size=16, padding=1, lr=0.1, alpha_lr=0.1
)
SPACES = [dict(space="hb", init="heavy-ball"), dict(space="agd"), dict(space="darts", strategy="gumbel")]
BATCHES = 3 * 3

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["search_runs", "nni_spaces.search"])


def run(folder, settings, **kwargs):
    process = processes.Process(target=search_runs.run, args=(folder, settings), kwargs=kwargs)
    process.start()
    process.join(300)
    return process.exitcode


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def differences(a, b, path=""):
    """Where two nests of containers, tensors and numbers differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        keys = [path] if a.keys() != b.keys() else []
        return keys + [d for key in a if key in b for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def without_times(folder):
    return [{k: v for k, v in entry.items() if k not in ("seconds", "resumed")} for entry in read_history(folder)]


def assert_same_search(folder, reference):
    """α, β, weights, statistics, moments of both optimisers, schedules, progress, genotypes: to the bit."""
    assert differences(checkpoint(folder), checkpoint(reference)) == []
    assert without_times(folder) == without_times(reference)
    assert (folder / "genotype.json").read_bytes() == (reference / "genotype.json").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folders = {}
    for settings in SPACES:
        folders[settings["space"]] = tmp_path_factory.mktemp(settings["space"])
        assert run(folders[settings["space"]], {**TINY, **settings}) == 0
    return folders


# --- the same result --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("settings", SPACES, ids=lambda s: s["space"])
def test_the_same_seed_gives_the_same_search_with_any_number_of_workers(settings, uninterrupted, tmp_path):
    assert run(tmp_path, {**TINY, **settings}, workers=2) == 0
    assert_same_search(tmp_path, uninterrupted[settings["space"]])
    assert len(read_history(tmp_path)) == TINY["epochs"]
    assert checkpoint(tmp_path)["state_dict"].keys() >= {"training_module._model.fc.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SPACES, ids=lambda s: s["space"])
def test_killed_anywhere_and_resumed_it_is_the_uninterrupted_search(settings, uninterrupted, tmp_path):
    """Twenty kills: at random batches, and while the files of an epoch are renamed; workers 0 and 2."""
    rng = random.Random(settings["space"])
    kills = [dict(kill_at=rng.randint(1, BATCHES)) for _ in range(4)]
    kills += [dict(kill_in_save=rng.randint(1, 6)) for _ in range(3)]
    for i, kill in enumerate(kills):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert run(folder, {**TINY, **settings}, workers=2 * (i == 0), **kill) == -signal.SIGKILL
        assert not (folder / "genotype.json").exists()
        assert run(folder, {**TINY, **settings}, workers=2 * (i == 1)) == 0
        assert_same_search(folder, uninterrupted[settings["space"]])
        assert not list(folder.glob(".checkpoint*")) or kill.get("kill_in_save")


@pytest.mark.slow
def test_another_seed_gives_another_search(uninterrupted, tmp_path):
    assert run(tmp_path, {**TINY, **SPACES[0], "seed": 1}) == 0
    assert differences(checkpoint(tmp_path), checkpoint(uninterrupted["hb"]))


@pytest.mark.slow
def test_the_search_learns_and_records_it(uninterrupted):
    history = read_history(uninterrupted["agd"])
    assert [entry["epoch"] for entry in history] == [0, 1, 2]
    for entry in history:
        genotype = Genotype.from_json(json.dumps(entry["genotype"]))
        assert genotype.rule == "agd"
        assert sum(entry["probabilities"]["normal/2_0"].values()) == pytest.approx(1)
        assert entry["probabilities"].keys() >= {"normal/beta_2", "reduce/3_2"}
    assert history[2]["train_loss"] < history[0]["train_loss"]
    assert history[2]["probabilities"] != history[0]["probabilities"]
    moved = checkpoint(uninterrupted["hb"])["optimizer_states"]
    assert len(moved) == 2, "weights and architecture"


# --- strategies -------------------------------------------------------------------------------------------------------


EXPERIMENTS = {"hb": partial(HBSpace, initialization=HeavyBallInit()), "agd": AGDSpace, "darts": DARTSSpace}


def experiment(space, strategy, tmp_path, monkeypatch):
    """NNI's own experiment on the digits."""
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.manual_seed(0)
    data = read_images("digits", 64)
    loaders = make_loaders(data, 16, 0, padding=0)
    evaluator = Classification(
        train_dataloaders=loaders[0], val_dataloaders=loaders[1], num_classes=10, max_epochs=1, accelerator="cpu",
        devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run = NasExperiment(space, evaluator, strategy)
    run.config.experiment_working_directory = tmp_path / "nni"
    run.run()
    samples = run.export_top_models(formatter="dict")
    run.stop()  # or NNI does it at exit, when logging is gone
    return samples


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERIMENTS)
@pytest.mark.parametrize(
    "strategy",
    [DARTS, lambda: DARTS(order=2), GumbelDARTS, StockDARTS, StockGumbelDARTS, RandomOneShot],
    ids=["first", "second", "gumbel", "stock first", "stock gumbel", "random"],
)
def test_nnis_own_experiment_takes_space_and_strategy(strategy, kind, tmp_path, monkeypatch):
    """With NNI's own evaluator; its strategies too."""
    space = EXPERIMENTS[kind](channels=2, cells=3, nodes=2, in_chans=1)
    (sample,) = experiment(space, strategy(), tmp_path, monkeypatch)
    assert space.genotype(sample).rule == space.rule
    assert space.freeze(sample)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


class Quadratic(SearchModule):
    """A loss with a known second-order gradient: ½ Σ (w − α)² on training, ½ Σ w² on validation batches."""

    def training_step(self, batch, batch_idx):
        w, alpha = self.model.w, self.model.alpha
        self.model.seen += 1  # as running statistics do
        return 0.5 * ((w - alpha) ** 2).sum() if batch == "train" else 0.5 * (w**2).sum() + alpha.sum()


def quadratic(momentum=0.0):
    """NNI's module with our step around the quadratic."""
    module = object.__new__(DARTS.module_type)
    torch.nn.Module.__init__(module)
    net = torch.nn.Module()
    net.w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    net.alpha = torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))
    net.register_buffer("seen", torch.zeros(1))
    module.training_module = Quadratic(0.1, momentum, 0.0, 1)
    module.training_module.set_model(net)
    module.arch_parameters = lambda: [net.alpha]
    return module, net


def test_first_order_gradient_is_alphas_alone():
    module, net = quadratic()
    module.penalty = None
    module.manual_backward = lambda loss, inputs: loss.backward(inputs=inputs)
    module._first_order_gradient("train", 0)
    assert torch.equal(net.alpha.grad, net.alpha.detach() - net.w.detach())
    assert net.w.grad is None, "the step that α takes costs no gradient of the weights"


def test_a_penalty_is_part_of_alphas_loss():
    module, net = quadratic()
    module.manual_backward = lambda loss, inputs: loss.backward(inputs=inputs)
    module.export_probs, logged = dict, {}
    module.log_dict = logged.update
    module.penalty = lambda loss, probs: (loss + 3 * net.alpha.sum(), {"size": 3.0})
    module._first_order_gradient("train", 0)
    assert torch.equal(net.alpha.grad, net.alpha.detach() - net.w.detach() + 3)
    assert logged == {"penalty/size": 3.0}


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_step_moves_alpha_behind_the_warm_up_and_clips_the_weights(epoch):
    module, net = quadratic()
    module._fabric, module._trainer = None, SimpleNamespace(current_epoch=epoch)
    module.warmup_epochs, module.gradient_clip_val, module.order, module.penalty = 1, 5.0, 1, None
    module.log_prob_every_n_step = 2
    module.resample = module.advance_lr_schedulers = lambda *args: None
    module.manual_backward = lambda loss, inputs: loss.backward(inputs=inputs)
    adam, clipped = torch.optim.Adam([net.alpha], 0.1), []
    module.architecture_optimizers = lambda: adam

    def advance(loss, batch_idx, clip):
        clipped.append(clip)
        assert not net.alpha.requires_grad
        assert net.w.requires_grad

    module.advance_optimization = advance
    start = net.alpha.detach().clone()
    module.training_step({"train": "train", "val": "val"}, 1)
    assert clipped == [5.0]
    torch.testing.assert_close(net.alpha.detach(), start - 0.1 * epoch)  # Adam's first step


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_order_gradient(momentum):
    """d/dα L_val(w − ξ (m v + ∇L_train(w, α) + λ w), α) = 1 + ξ w'."""
    module, net = quadratic(momentum)
    sgd = torch.optim.SGD([net.w], 0.1, momentum=momentum, weight_decay=0.01)
    buffer = torch.tensor([0.5, 0.25], dtype=torch.float64)
    if momentum:
        sgd.state[net.w]["momentum_buffer"] = buffer
    module.optimizers = lambda: [sgd]
    module._second_order_gradient("train", "val", 0)
    w, alpha = net.w.detach(), net.alpha.detach()
    assert w.tolist() == [1.0, -2.0], "the weights are put back"
    assert net.seen == 0, "and so are statistics"
    ahead = w - 0.1 * (momentum * buffer * bool(momentum) + (w - alpha) + 0.01 * w)
    torch.testing.assert_close(net.alpha.grad, 1 + 0.1 * ahead, rtol=1e-8, atol=1e-8)


def test_second_order_steps_by_the_settings_of_each_parameter_group():
    """d/dα L_val(w − Σ_g ξ_g (m_g v + ∇L_train + λ_g w), α) = 1 + ξ_g w'_g, each by its group."""
    module = object.__new__(DARTS.module_type)
    torch.nn.Module.__init__(module)
    net = torch.nn.Module()
    net.w = torch.nn.ParameterList(torch.tensor([value], dtype=torch.float64) for value in (1.0, -2.0))
    net.alpha = torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))

    class Groups(SearchModule):
        def training_step(self, batch, batch_idx):
            w, alpha = torch.cat(list(self.model.w)), self.model.alpha
            return 0.5 * ((w - alpha) ** 2).sum() if batch == "train" else 0.5 * (w**2).sum() + alpha.sum()

    module.training_module = Groups(0.1, 0, 0, 1)
    module.training_module.set_model(net)
    settings = [dict(lr=0.1, momentum=0.9, weight_decay=0.01), dict(lr=0.5, momentum=0.0, weight_decay=0.2)]
    sgd = torch.optim.SGD([dict(params=[w], **group) for w, group in zip(net.w, settings)], 1.0)
    sgd.state[net.w[0]]["momentum_buffer"] = torch.tensor([0.5], dtype=torch.float64)
    module.optimizers = lambda: [sgd]
    module.arch_parameters = lambda: [net.alpha]
    module._second_order_gradient("train", "val", 0)
    first = 1.0 - 0.1 * (0.9 * 0.5 + (1.0 - 0.3) + 0.01 * 1.0)
    second = -2.0 - 0.5 * ((-2.0 - 0.7) + 0.2 * -2.0)
    expected = torch.tensor([1 + 0.1 * first, 1 + 0.5 * second], dtype=torch.float64)
    torch.testing.assert_close(net.alpha.grad, expected, rtol=1e-8, atol=1e-8)


def test_architecture_parameters_have_the_order_of_the_modules():
    """NNI's is that of a set of objects; Adam's moments of a resumed search would go to other parameters."""
    kept, stock = [], []  # kept, so that each has addresses of its own
    for _ in range(5):
        model = DARTS().mutate_model(AGDSpace(channels=2, cells=4, nodes=2))
        module = object.__new__(DARTS.module_type)
        torch.nn.Module.__init__(module)
        module.training_module = torch.nn.Module()
        module.training_module.model = model
        kept.append(module)
        found = {id(p): n for n, p in model.named_parameters()}
        ours, stocks = (
            [found[id(p)] for p in order(module)]
            for order in (DARTS.module_type.arch_parameters, DartsLightningModule.arch_parameters)
        )
        assert len(ours) == len(set(ours)) == 2 * (5 + 2)
        assert ours == [name for name in found.values() if name in ours]
        assert set(ours) == set(stocks)
        stock.append(stocks)
    assert any(order != ours for order in stock)


def test_alphas_optimiser_has_the_papers_hyperparameters():
    strategy = DARTS()
    module = strategy.configure_oneshot_module(SearchModule(0.1, 0.9, 3e-4, 1))
    module.training_module.set_model(strategy.mutate_model(HBSpace(channels=2, cells=3, nodes=2)))
    adam = module.configure_architecture_optimizers()
    (group,) = adam.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.5, 0.999), 1e-3)
    assert module.gradient_clip_val == 5.0
    assert len(group["params"]) == 2 * 6


def test_settings_reach_the_strategy_and_the_space():
    settings = SearchSettings(
        alpha_lr=0.1, alpha_weight_decay=0.2, gradient_clip=0.3, warmup_epochs=4, init="zero", nodes=2, channels=4
    )
    strategy = settings.make_strategy()
    found = strategy.arc_learning_rate, strategy.alpha_weight_decay, strategy.gradient_clip_val, strategy.warmup_epochs
    assert found == (0.1, 0.2, 0.3, 4)
    assert SearchSettings(strategy="darts-second-order").make_strategy().order == 2
    assert isinstance(SearchSettings(strategy="gumbel").make_strategy(), GumbelDARTS)
    space = settings.make_space(7, 1)
    assert space.initialization == ZeroInit()
    assert space(torch.zeros(1, 1, 8, 8)).shape == (1, 7)


def test_the_weights_optimiser_is_sgd_under_a_cosine():
    module = SearchModule(0.025, 0.9, 3e-4, 50)
    module.set_model(torch.nn.Linear(2, 2))
    (sgd,), (cosine,) = module.configure_optimizers()
    (group,) = sgd.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 3e-4)
    rates = []
    for _ in range(51):
        rates.append(group["lr"])
        sgd.step()
        cosine.step()
    assert rates[::25] == pytest.approx([0.025, 0.0125, 0])


def test_a_search_loads_images_by_its_settings(tmp_path, monkeypatch):
    class Loaded(Exception):
        pass

    def load(*args):
        raise Loaded(args[1:])

    monkeypatch.setattr("nni_spaces.search.make_loaders", load)
    with pytest.raises(Loaded) as caught:
        search(SearchSettings(**{**TINY, "padding": 3, "seed": 5}), tmp_path, workers=2)
    assert caught.value.args == ((16, 5, 2, 3, 1),)


# --- images -----------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_images(tmp_path):
    digits = read_images("digits", 40)
    assert digits.images.shape == (40, 1, 8, 8)
    assert digits.classes == 10
    images = digits.images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", x_train=images, y_train=digits.labels.numpy())
    for part in ("", "train/"):
        for i, label in enumerate(digits.labels.tolist()):
            folder = tmp_path / f"folder{bool(part)}" / f"{part}{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i, :, :, 0]).save(folder / f"{i:03}.png")
    assert torch.equal(read_images(tmp_path / "a.npz").images, digits.images)
    for name in ("folderFalse", "folderTrue"):
        found = read_images(tmp_path / name)
        order, ours = (torch.argsort(labels, stable=True) for labels in (digits.labels, found.labels))
        assert torch.equal(found.images[ours], digits.images[order])
        assert torch.equal(found.labels[ours], digits.labels[order])
        assert len(set(read_images(tmp_path / name, 10).labels.tolist())) == 10, "classes take turns"


def test_an_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(10, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(i for _, i in order(0, 3)) == list(range(10))
    assert {e for e, _ in order(0, 3)} == {3}
    assert order(0, 3) == order(0, 3)
    assert [i for _, i in order(0, 3)] != [i for _, i in order(0, 4)]
    assert order(0, 3) != order(1, 3)


def test_augmentation_shifts_flips_and_cuts():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(4, 3, 1, 1)
    data = ImageSet(images, torch.zeros(4, dtype=torch.int64), 2)
    plain = SeededImages(data, torch.arange(4), 0)
    shifted = SeededImages(data, torch.arange(4), 0, padding=2)
    assert torch.equal(plain[0, 1][0], plain[5, 1][0])
    assert torch.equal(shifted[0, 1][0], shifted[0, 1][0])
    assert not torch.equal(shifted[0, 1][0], shifted[1, 1][0])
    flips = [shifted[e, 0][0][0, 8, 4] > shifted[e, 0][0][0, 8, 10] for e in range(40)]
    assert 8 < sum(flips) < 32
    cut = SeededImages(data, torch.arange(4), 0, cutout=6)[0, 0][0]
    assert 9 <= (cut == 0).all(0).sum() <= 36
    assert abs(torch.stack([plain[0, i][0] for i in range(4)]).mean()) < 1e-5


def test_halves_are_disjoint_and_cover_the_images():
    data = ImageSet(torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1), torch.arange(20), 20)
    first, second = (set(loader.dataset.labels.tolist()) for loader in make_loaders(data, 5, 0))
    assert first.isdisjoint(second)
    assert len(first | second) == 20


# --- what does not go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(space="resnet"), "space='resnet': must be one of hb, agd, darts"),
        (dict(init="one"), "init='one': must be one of heavy-ball, zero, random"),
        (dict(strategy="enas"), "strategy='enas': must be one of darts, darts-second-order, gumbel"),
        (dict(epochs=0), "epochs=0: must be an integer ≥ 1"),
        (dict(lr=float("nan")), "lr=nan: must be a positive number"),
        (dict(seed=0.5), "seed=0.5: must be an integer ≥ 0"),
        (dict(skip_dropout=1.5), "skip_dropout=1.5: must be a number ≥ 0 and < 1"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data="nowhere"), "data='nowhere': must be 'digits', 'cifar10', an .npz file or a folder"),
        (dict(space="agd", init="heavy-ball"), "initialization=HeavyBallInit: needs HBSpace"),
        (dict(batch_size=64), "batch_size=64: must be at most 48, half of the images"),
        (dict(cells=2), "cells=2: must be an integer ≥ 3"),
    ],
)
def test_what_a_search_refuses(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        search(SearchSettings(**{**TINY, **change}), tmp_path)


def test_data_without_two_classes_or_of_several_sizes(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match="has 1 class folders, must have at least 2"):
        read_images(tmp_path)
    for name, size in (("one", 8), ("two", 9)):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("L", (size, size)).save(tmp_path / name / "a.png")
    with pytest.raises(ValueError, match="has images of 2 sizes, must have one"):
        read_images(tmp_path)
    np.savez(tmp_path / "a.npz", x_train=np.zeros((3, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="has no array y_train, must have x_train and y_train"):
        read_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x_train=np.zeros((3, 8, 8, 1), np.uint8), y_train=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="has 1 classes, must have at least 2"):
        read_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_train=np.zeros((8, 4, 4), np.uint8)), r"x_train is uint8 of shape \(8, 4, 4\), must be uint8 of"),
        (dict(x_train=np.zeros((8, 4, 4, 1))), r"x_train is float64 of shape \(8, 4, 4, 1\), must be uint8 of"),
        (
            dict(y_train=np.zeros(7, np.int64)),
            r"y_train is int64 of shape \(7,\), must be integers ≥ 0 of shape \(8,\)",
        ),
        (dict(y_train=np.arange(8) - 1), "y_train is int64 of shape .* must be integers ≥ 0"),
        (dict(y_train=np.arange(8) / 2), "y_train is float64 of shape .* must be integers ≥ 0"),
    ],
)
def test_arrays_that_are_no_images_or_labels(change, message, tmp_path):
    arrays = dict(x_train=np.zeros((8, 4, 4, 1), np.uint8), y_train=np.arange(8, dtype=np.uint8))
    np.savez(tmp_path / "a.npz", **arrays)
    assert read_images(tmp_path / "a.npz").labels.tolist() == list(range(8))
    content = (tmp_path / "a.npz").read_bytes()
    np.savez(tmp_path / "a.npz", **{**arrays, **change})
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"must be an \.npz file, is damaged"):
        read_images(tmp_path / "a.npz")
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f"limit={limit}: must be an integer ≥ 1"):
            read_images("digits", limit)


def test_a_folder_of_another_search_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({**TINY, "space": "agd"}))
    with pytest.raises(ValueError, match=r"holds a run with space='agd' \(here 'hb'\): choose another folder"):
        search(SearchSettings(**TINY), tmp_path)
    (tmp_path / "settings.json").unlink()
    for content in (b"", b"garbage", b"PK\x03\x04 cut off"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.pt: damaged; remove it to begin anew"):
            search(SearchSettings(**TINY), tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json: not the settings of such a run"):
        search(SearchSettings(**TINY), tmp_path)


@pytest.mark.slow
def test_a_folder_holds_one_process_and_a_killed_one_frees_it(tmp_path):
    held, done = processes.Event(), processes.Event()
    process = processes.Process(target=search_runs.hold, args=(tmp_path, held, done))
    process.start()
    assert held.wait(60)
    with pytest.raises(RuntimeError, match="another process is running there"):
        search(SearchSettings(**TINY), tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    with locked(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("file", ["checkpoint.pt", "history.json"])
def test_a_full_disk_keeps_the_last_good_epoch(file, tmp_path, monkeypatch):
    rename, calls = os.replace, []

    def full(source, target):
        if os.fspath(target).endswith(file):
            calls.append(target)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        search(SearchSettings(**TINY), tmp_path, accelerator="cpu")
    assert checkpoint(tmp_path)["epoch"] == 0
    assert [entry["epoch"] for entry in read_history(tmp_path)] == ([0, 1] if file == "checkpoint.pt" else [0])
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock", "settings.json", "run.json", "checkpoint.pt", "history.json"
    }  # fmt: skip


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_names_epoch_and_step(tmp_path, monkeypatch):
    calls = []
    plain = torch.nn.functional.cross_entropy

    def poisoned(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs) * (float("nan") if len(calls) == 2 * 3 + 3 else 1)

    monkeypatch.setattr("nni_spaces.search.F.cross_entropy", poisoned)
    with pytest.raises(FloatingPointError, match=r"loss=nan in epoch 2, step 2: must be finite"):
        search(SearchSettings(**TINY), tmp_path, accelerator="cpu")
    assert checkpoint(tmp_path)["epoch"] == 0


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_kept(tmp_path, monkeypatch):
    """After the last step of an epoch no loss tells."""
    plain, steps = SearchModule.training_step, []

    def training_step(self, batch, batch_idx):
        steps.append(batch_idx)
        loss = plain(self, batch, batch_idx)
        last = len(steps) == 2 * 2 * 3  # of the second epoch
        return loss + 0 * self.model.fc.weight.sum() * float("inf") if last else loss

    monkeypatch.setattr(SearchModule, "training_step", training_step)
    with pytest.raises(FloatingPointError, match="weights after epoch 2: must be finite; lower lr or clip more"):
        search(SearchSettings(**TINY), tmp_path, accelerator="cpu")
    assert checkpoint(tmp_path)["epoch"] == 0
    assert [entry["epoch"] for entry in read_history(tmp_path)] == [0]
