"""Searches: reproducible, resumable to the bit after SIGKILL, and clear about what they refuse."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from extras import needs

needs("nni", "sklearn")

import search_runs

from nni_spaces import GumbelDARTS, ZeroInit
from nni_spaces.runs.search import SearchModule, make_space, make_strategy, search
from nni_spaces.runs.settings import SearchSettings
from optinspired_plugins import Genotype
from optinspired_plugins.run_folder import lock_folder, read_history

TINY = dict(
    data="digits", limit=64, epochs=3, channels=2, cells=3, nodes=2, batch_size=16, padding=1, lr=0.1, alpha_lr=0.1
)
SPACES = [
    dict(space="hb", initialization="heavy-ball", alpha_decay_to="start"),
    dict(space="agd"),
    dict(space="darts", strategy="gumbel"),
]
BATCHES = 3 * 2

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["search_runs", "nni_spaces.runs.search", "sklearn.datasets"])


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
def uninterrupted(once):
    def search(settings, folder):
        assert run(folder, {**TINY, **settings}) == 0

    return {s["space"]: once(f"search_{s['space']}", partial(search, s)) for s in SPACES}


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


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_reach_the_strategy_and_the_space():
    settings = SearchSettings(
        alpha_lr=0.1,
        alpha_weight_decay=0.2,
        alpha_decay_to="start",
        gradient_clip=0.3,
        warmup_epochs=4,
        initialization="zero",
        nodes=2,
        channels=4,
    )
    strategy = make_strategy(settings)
    found = strategy.arc_learning_rate, strategy.alpha_weight_decay, strategy.gradient_clip_val, strategy.warmup_epochs
    assert found == (0.1, 0.2, 0.3, 4)
    assert make_strategy(SearchSettings(strategy="darts-second-order")).order == 2
    assert isinstance(make_strategy(SearchSettings(strategy="gumbel")), GumbelDARTS)
    space = make_space(settings, 7, 1)
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

    def load(*args, **options):
        raise Loaded(args[1:], options)

    monkeypatch.setattr("nni_spaces.runs.search.make_loaders", load)
    with pytest.raises(Loaded) as caught:
        search(SearchSettings(**{**TINY, "padding": 3, "seed": 5, "flip": False}), tmp_path, workers=2)
    assert caught.value.args == ((16, 5, 2, 3, 1), dict(transform=None, flip=False))


# --- what does not go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(space="resnet"), "space='resnet': must be one of hb, agd, darts"),
        (dict(initialization="one"), "initialization='one': must be one of heavy-ball, zero, random"),
        (dict(strategy="enas"), "strategy='enas': must be one of darts, darts-second-order, gumbel"),
        (dict(epochs=0), "epochs=0: must be an integer ≥ 1"),
        (dict(lr=float("nan")), "lr=nan: must be a positive number"),
        (dict(seed=0.5), "seed=0.5: must be an integer ≥ 0"),
        (dict(skip_dropout=1.5), r"skip_dropout=1.5: must be in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data="nowhere"), "data='nowhere': must be 'digits', 'cifar10', an .npz file or a folder"),
        (dict(space="agd", initialization="heavy-ball"), "initialization=HeavyBallInit: needs HBSpace"),
        (dict(batch_size=64), "batch_size=64: must be at most 32, half of the images"),
        (dict(cells=2), "cells=2: must be an integer ≥ 3"),
    ],
)
def test_what_a_search_refuses(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        search(SearchSettings(**{**TINY, **change}), tmp_path)


class Started(Exception):
    pass


def start(settings, folder):
    """Search until the first batch is done."""

    def on_batch():
        raise Started

    search(SearchSettings(**settings), folder, accelerator="cpu", on_batch=on_batch)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (dict(batch_size=64), "batch_size=64: must be at most 32"),
        (dict(strategy="darts-second-order", skip_dropout=0.1), "skip_dropout=0.1 with strategy=DARTS"),
    ],
)
def test_refused_settings_do_not_bind_the_folder(wrong, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        start({**TINY, **wrong}, tmp_path)
    with pytest.raises(Started):
        start(TINY, tmp_path)
    written = json.loads((tmp_path / "settings.json").read_text())
    assert (written.pop("devices"), written.pop("precision")) == (1, "32-true")
    assert SearchSettings(**written) == SearchSettings(**TINY)


def test_a_search_that_ends_in_its_first_epoch_does_not_bind_the_folder(tmp_path):
    facts = []
    for channels in (2, 4):
        with pytest.raises(Started):
            start({**TINY, "channels": channels}, tmp_path)
        facts.append(json.loads((tmp_path / "run.json").read_text())["parameters"])
    assert facts[0] < facts[1], "sizes of the search that is in the folder now"


def test_a_folder_of_another_search_is_refused(tmp_path):
    for content in (b"", b"garbage", b"PK\x03\x04 cut off"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.pt: damaged; remove it to begin anew"):
            search(SearchSettings(**TINY), tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({**TINY, "space": "agd"}))
    with pytest.raises(ValueError, match=r"holds a run with space='agd' \(here 'hb'\): choose another folder"):
        search(SearchSettings(**TINY), tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json: not the settings of such a run"):
        search(SearchSettings(**TINY), tmp_path)


def test_a_system_without_record_locks_is_named_when_a_run_begins(tmp_path):
    code = """if True:
        import sys
        sys.modules["fcntl"] = None
        from pathlib import Path
        from optinspired_plugins.run_folder import lock_folder
        try:
            with lock_folder(Path("run")):
                pass
        except NotImplementedError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "out='run': a run locks its folder by fcntl, which Linux does not have: must be a Unix" in done.stdout, (
        done.stderr
    )
    assert not (tmp_path / "run").exists()


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
    with lock_folder(tmp_path):
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
        return plain(*args, **kwargs) * (float("nan") if len(calls) == 2 * 2 + 3 else 1)

    monkeypatch.setattr("nni_spaces.runs.objective.F.cross_entropy", poisoned)
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
        last = len(steps) == 2 * 2 * 2  # of the second epoch
        return loss + 0 * self.model.fc.weight.sum() * float("inf") if last else loss

    monkeypatch.setattr(SearchModule, "training_step", training_step)
    with pytest.raises(FloatingPointError, match="weights after epoch 2: must be finite; lower lr or clip more"):
        search(SearchSettings(**TINY), tmp_path, accelerator="cpu")
    assert checkpoint(tmp_path)["epoch"] == 0
    assert [entry["epoch"] for entry in read_history(tmp_path)] == [0]
