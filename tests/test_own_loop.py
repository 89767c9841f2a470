"""The loop of a run: precision, label smoothing, and more epochs by a warm restart."""

import json

import pytest
import torch
from extras import needs

needs("nni", "sklearn")

from torch.nn import functional as F

from nni_spaces.runs.objective import Objective
from nni_spaces.runs.progressive import search_progressively
from nni_spaces.runs.retrain import retrain
from nni_spaces.runs.search import search
from nni_spaces.runs.settings import RetrainSettings, SearchSettings
from optinspired_plugins.run_folder import read_history

SKIP = [["skip_connect", 1], ["avg_pool_3x3", 1], ["skip_connect", 0]]
GENOTYPE = {"version": 1, "rule": "hb", "normal": [SKIP], "reduction": [SKIP]}
TINY = dict(data="digits", limit=40, epochs=1, cells=3, channels=2, batch_size=16, padding=0)


def searched(folder, precision="32-true", **settings):
    search(SearchSettings(**{**TINY, "nodes": 1, **settings}), folder, accelerator="cpu", precision=precision)
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state_dict"]


def trained(folder, **settings):
    retrain(RetrainSettings(**{**TINY, "genotype": GENOTYPE, "cutout": 0, **settings}), folder, accelerator="cpu")
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state_dict"]


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_a_search_has_a_precision(precision, tmp_path):
    state = searched(tmp_path, precision)
    assert json.loads((tmp_path / "settings.json").read_text())["precision"] == precision
    kind = torch.float64 if precision == "64-true" else torch.float32
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {kind}
    with pytest.raises(ValueError, match=f"holds a run with precision='{precision}'"):
        searched(tmp_path)


def test_a_precision_with_scaled_gradients_is_refused(tmp_path):
    with pytest.raises(ValueError, match="precision='16-mixed': a search clips scaled gradients then, must be another"):
        searched(tmp_path, "16-mixed")


# --- label smoothing --------------------------------------------------------------------------------------------------


def test_labels_are_smoothed_in_training_only():
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    plain, smooth = Objective(), Objective(label_smoothing=0.2)
    assert torch.equal(plain(logits, labels), F.cross_entropy(logits, labels))
    log_p = logits.log_softmax(1)
    expected = -(0.8 * log_p[torch.arange(6), labels] + 0.2 * log_p.mean(1)).mean()
    torch.testing.assert_close(smooth(logits, labels), expected)
    assert torch.equal(smooth(logits, labels, training=False), plain(logits, labels))


@pytest.mark.parametrize("run", [searched, trained])
def test_smoothing_reaches_a_run(run, tmp_path):
    run(tmp_path / "plain")
    run(tmp_path / "smooth", label_smoothing=0.5)
    losses = [read_history(tmp_path / name)[0]["train_loss"] for name in ("plain", "smooth")]
    assert losses[0] != losses[1]
    assert json.loads((tmp_path / "smooth" / "settings.json").read_text())["label_smoothing"] == 0.5


@pytest.mark.parametrize("kind", [SearchSettings, lambda **o: RetrainSettings(genotype=GENOTYPE, **o)])
def test_wrong_smoothing_is_named(kind):
    with pytest.raises(ValueError, match=r"label_smoothing=1: must be in \[0, 1\)"):
        kind(label_smoothing=1)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 with regression=True: must be 0"):
        kind(label_smoothing=0.1, regression=True)


# --- more epochs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [searched, trained])
def test_a_run_with_more_epochs_starts_from_a_finished_one(run, tmp_path):
    first = run(tmp_path / "first")
    with pytest.raises(ValueError, match=r"epochs=1 \(here 2\): choose another folder, with start_from='.*first' for"):
        run(tmp_path / "first", epochs=2)
    # With so small a rate the weights stay, so that the end is the start.
    tiny = dict(lr=1e-12, weight_decay=0.0) | (dict(alpha_lr=1e-12) if run is searched else {})
    second = run(tmp_path / "second", start_from=str(tmp_path / "first"), epochs=2, seed=5, **tiny)
    moving = [name for name, value in first.items() if value.is_floating_point() and "running" not in name]
    assert any(name.endswith("_arch_alpha") for name in moving) == (run is searched)
    for name in moving:
        torch.testing.assert_close(second[name], first[name], msg=name)
    other = run(tmp_path / "third", epochs=2, seed=5, **tiny)
    assert any(not torch.equal(other[name], first[name]) for name in moving), "another seed has another start"
    assert len(read_history(tmp_path / "second")) == 2


def test_a_start_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="start_from='nowhere': must be the folder of a run with a finished epoch"):
        trained(tmp_path / "a", start_from="nowhere")
    trained(tmp_path / "first")
    with pytest.raises(ValueError, match=r"start_from='.*first': must hold a run of the same network \(state_dict, '"):
        trained(tmp_path / "b", start_from=str(tmp_path / "first"), channels=4)
    with pytest.raises(ValueError, match="start_from='a' with strategy='p-darts': must be None"):
        search_progressively(SearchSettings(**TINY, strategy="p-darts", start_from="a"), tmp_path / "c")


def test_a_resumed_restart_does_not_start_anew(tmp_path):
    """Its own checkpoint counts, also where the first folder is gone."""
    trained(tmp_path / "first")
    settings = dict(start_from=str(tmp_path / "first"), epochs=2)
    whole = trained(tmp_path / "whole", **settings)

    class Stopped(Exception):
        pass

    def stop(entry):
        raise Stopped

    chosen = RetrainSettings(**{**TINY, "genotype": GENOTYPE, "cutout": 0, **settings})
    with pytest.raises(Stopped):
        retrain(chosen, tmp_path / "cut", accelerator="cpu", on_epoch=stop)
    (tmp_path / "first" / "checkpoint.pt").unlink()
    resumed = trained(tmp_path / "cut", **settings)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
