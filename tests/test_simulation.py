"""Table 2: networks and training of section 6.3; an interrupted simulation continues."""

import errno
import math
import os
import re
from pathlib import Path
from statistics import stdev

import pytest
import torch
from torch import nn

from optinspired_plugins import simulation
from optinspired_plugins.simulation import PAPER, Recipe, build, read_runs, simulate, summarise, to_markdown, train

ROOT = Path(__file__).parents[1]
TINY = Recipe(pairs=40, dimension=3, batch_size=10, steps=6)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("network", "layers"), [("gd", 5), ("hb", 5), ("agd", 5), ("agd2", 5), ("admm", 10)])
def test_networks_have_a_sigmoid_layer_a_call(network, layers):
    net = build(network, 5, Recipe(), generator())
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == layers
    assert sum(isinstance(m, nn.Sigmoid) for m in net.modules()) == layers
    for m in linear:
        assert m.weight.shape == (100, 100)
        assert m.weight.abs().max() <= (6 / 200) ** 0.5  # Xavier uniform
        assert m.weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.03)
        assert not m.bias.any()


def test_gradient_descent_is_a_stack_of_sigmoid_layers():
    net = build("gd", 3, TINY, generator())
    x = torch.randn(2, 3)
    torch.testing.assert_close(net(x), nn.Sequential(*net.transforms)(x))


def test_training_is_the_stated_optimiser_on_the_stated_loss():
    """Plain SGD on the mean squared error over all elements, every pair once an epoch."""
    recipe = Recipe(pairs=20, dimension=3, batch_size=20, steps=3)
    got = train("hb", 2, 7, recipe)
    g = torch.Generator().manual_seed(7)
    x, f = torch.randn(2, 20, 3, generator=g)
    net = build("hb", 2, recipe, g)
    for _ in range(3):
        net.zero_grad()
        ((net(x) - f) ** 2).mean().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= recipe.lr * p.grad
    assert got.mse == pytest.approx(((net(x) - f) ** 2).mean().item(), rel=1e-5)
    assert got.output_std == pytest.approx(net(x).std(0).mean().item(), rel=1e-4)


def test_a_run_is_a_function_of_its_seed():
    first, second, other = (train("agd2", 3, seed, TINY) for seed in (0, 0, 1))
    assert first[:5] == second[:5]
    assert first.mse != other.mse


def test_batches_cover_every_pair_before_any_comes_again():
    indices = list(simulation._batches(TINY, generator()))
    assert [len(b) for b in indices] == [10] * 6
    assert sorted(torch.cat(indices[:4]).tolist()) == list(range(40))


def test_divergence_is_a_result(monkeypatch):
    """Sigmoid networks cannot diverge; a linear one can."""
    monkeypatch.setattr(simulation, "build", lambda *_: nn.Linear(3, 3))
    run = train("gd", 3, 0, Recipe(pairs=40, dimension=3, batch_size=10, steps=6, lr=1e30))
    assert math.isnan(run.mse)
    assert math.isnan(run.output_std)


class Stop(Exception):
    pass


def test_an_interrupted_simulation_goes_on(tmp_path):
    path, trained = tmp_path / "new" / "table2.csv", []

    def interrupt(run, found):
        trained.append(run[:3])
        if len(trained) == 3:
            raise Stop

    arguments = dict(networks=("gd", "hb"), depths=(1, 2), seeds=(0, 1), recipe=TINY)
    with pytest.raises(Stop):
        simulate(path, **arguments, on_run=interrupt)
    before = path.read_text()
    found = []
    runs = simulate(path, **arguments, on_run=lambda run, known: found.append(known))
    assert found == [True] * 3 + [False] * 5
    assert path.read_text().startswith(before)
    reference = simulate(tmp_path / "reference.csv", **arguments)
    assert [r[:5] for r in runs] == [r[:5] for r in reference]
    assert read_runs(path) == runs


def test_a_full_disk_leaves_the_runs_before(tmp_path, monkeypatch):
    path = tmp_path / "table2.csv"
    simulate(path, ("gd",), (1,), (0,), TINY)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        simulate(path, ("gd",), (1,), (0, 1), TINY)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f".{path.name}.lock"}


def test_runs_of_another_recipe_are_not_mixed_in(tmp_path):
    path = tmp_path / "table2.csv"
    simulate(path, ("gd",), (1,), (0,), TINY)
    with pytest.raises(ValueError, match=r"table2.csv, line 2: a run with lr=0.5 \(here 0.1\)"):
        simulate(path, ("gd",), (1,), (1,), Recipe(pairs=40, dimension=3, batch_size=10, steps=6, lr=0.1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("gd,1,0,nonsense,0,1,40,3,0.5,10,6", "not a run of the simulation (mse='nonsense': must be a number)"),
        ("gd,1,0,inf,0,1,40,3,0.5,10,6", "not a run of the simulation (mse=inf: must be a finite number"),
        ("gd,1,-1,1,0,1,40,3,0.5,10,6", "not a run of the simulation (seed=-1: must be an integer ≥ 0)"),
        ("sgd,1,0,1,0,1,40,3,0.5,10,6", "not a run of the simulation (network='sgd': must be one of gd, hb"),
        ("gd,1,0,1,0,1,-40,3,0.5,10,6", "not a run of the simulation (pairs=-40: must be an integer ≥ 1)"),
        ("gd,1", "does not have the fields of the first line: has 2, must have 11"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, damage, message):
    path = tmp_path / "table2.csv"
    simulate(path, ("gd",), (1,), (0,), TINY)
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(ValueError, match=re.escape(f"table2.csv, line 3: {message}")):
        read_runs(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(networks=("newton",)), "network='newton': must be one of gd, hb, agd, agd2, admm"),
        (dict(depths=(0,)), "depth=0: must be an integer ≥ 1"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_trained(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(tmp_path / "table2.csv", **{"networks": ("gd",), "depths": (1,), **arguments}, recipe=TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pairs", 0, "pairs=0: must be an integer ≥ 1"),
        ("steps", 1.5, "steps=1.5: must be an integer ≥ 1"),
        ("lr", float("nan"), "lr=nan: must be a positive number"),
        ("batch_size", 3_000, "batch_size=3000: must divide pairs=10000"),
    ],
)
def test_a_wrong_recipe_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{field: value})


def test_mean_and_spread_are_over_seeds():
    runs = [simulation.Run("hb", 10, seed, mse, std, 1.0) for seed, mse, std in ((0, 1.0, 0.1), (1, 3.0, 0.2))]
    (cell,) = summarise(runs)
    assert cell == simulation.TableEntry("hb", 10, 1.00443, 2.0, pytest.approx(2**0.5), 0.2, 2)
    assert math.isnan(summarise(runs[:1])[0].spread)
    assert "| hb | 10 | 1.00443 | 2.00000 | 1.41421 | 2 | 2.0e-01 |" in to_markdown([cell])


# --- the results that documents show ----------------------------------------------------------------------------------


def kept_runs():
    return read_runs(ROOT / "docs" / "results" / "table2.csv", Recipe())


def test_the_printed_table_is_that_of_the_kept_runs():
    cells = summarise(kept_runs())
    assert [(c.network, c.depth) for c in cells] == [(n, d) for n in PAPER for d in PAPER[n]]
    assert all(c.seeds >= 3 for c in cells)
    assert to_markdown(cells).strip() in (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def test_the_claims_about_the_kept_runs_hold():
    """The order ADMM > GD > HB > AGD > AGD2 in every seed and depth; outputs that ignore the input beyond depth 10."""
    runs = {(r.network, r.depth, r.seed): r for r in kept_runs()}
    for depth, seed in {(r.depth, r.seed) for r in runs.values()}:
        errors = [runs[network, depth, seed].mse for network in ("admm", "gd", "hb", "agd", "agd2")]
        assert errors == sorted(errors, reverse=True)
    assert max(r.output_std for r in runs.values() if r.depth > 10) < 1e-4
    for depth in (10, 20, 30, 40):  # the spread over seeds is that of the targets, which networks share
        apart = [runs["gd", depth, seed].mse - runs["agd", depth, seed].mse for seed in range(5)]
        assert 0.0001 <= round(stdev(apart), 4) <= 0.0002
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert re.search(r"in all 20 pairs of depth and seed", text)


@pytest.mark.slow
def test_a_kept_run_is_reproduced():
    """One row of the file, from a second training."""
    kept = next(r for r in kept_runs() if r[:3] == ("gd", 10, 0))
    assert train("gd", 10, 0).mse == pytest.approx(kept.mse, abs=2e-5)
