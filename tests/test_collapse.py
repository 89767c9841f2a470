"""Searches that end before skip connections take over: DARTS+, R-DARTS, and FairDARTS."""

import json

import pytest
import torch
from extras import needs

needs("nni", "sklearn", "typer")

from nni.nas.evaluator.pytorch import Classification
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import DARTS as StockDARTS

from nni_spaces import DARTS, AGDSpace, EigenvalueStop, FairDARTS, HBSpace, SkipStop, search
from nni_spaces.cli import _early_end
from nni_spaces.runs import search as search_module
from nni_spaces.runs.data import make_loaders, read_images
from nni_spaces.runs.search import SearchModule
from nni_spaces.runs.settings import SearchSettings
from nni_spaces.spaces import mixed_op
from nni_spaces.strategies import collapse
from nni_spaces.strategies.collapse import alpha_hessian, count_skips, largest_eigenvalue
from optinspired_plugins.report import page
from optinspired_plugins.report.files import read_run
from optinspired_plugins.run_folder import read_history

TINY = dict(channels=2, cells=3, nodes=2, in_chans=1)
SPACES = {"hb": HBSpace, "agd": AGDSpace}
SETTINGS = dict(data="digits", limit=64, batch_size=16, channels=2, cells=3, nodes=2, padding=0)


# --- eigenvalues ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(5, 2, -1, 0), (5, 2, -9, -1), (-1, -2, -9, -3), (0, 0, 0, 0), (3, 0, 0, 0)])
def test_the_largest_eigenvalue_is_found_by_products(values):
    basis, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    matrix = basis @ torch.diag(torch.tensor(values, dtype=torch.float32)) @ basis.T
    assert largest_eigenvalue(lambda v: matrix @ v, 4, 60) == pytest.approx(max(values), abs=1e-4)


def supernet(space, strategy=None):
    """A module of a search in float64, with a batch."""
    strategy = strategy or DARTS()
    module = strategy.configure_oneshot_module(SearchModule(0.1, 0.9, 3e-4, 1))
    torch.manual_seed(0)
    module.training_module.set_model(strategy.mutate_model(space))
    module.double()
    module.training_module.log = lambda *args, **kwargs: logged.append(args)
    module.training_module.trainer = type("Trainer", (), {"current_epoch": 0})()
    logged = module.logged = []
    return module, (torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4))


@pytest.mark.parametrize("form", ["plain", "checkpointing", "as on a GPU"])
@pytest.mark.parametrize("kind", SPACES)
def test_products_with_the_hessian_are_differences_of_gradients(kind, form, monkeypatch):
    checkpointing = form == "checkpointing"
    monkeypatch.setattr(mixed_op, "_launches_are_slow", lambda x: form == "as on a GPU")
    space = SPACES[kind](**TINY, operations=["skip_connect", "max_pool_3x3", "dil_conv_3x3"])
    space.set_grad_checkpointing(checkpointing)
    module, batch = supernet(space)
    alphas = module.arch_parameters()
    size = sum(alpha.numel() for alpha in alphas)
    v = torch.randn(size, dtype=torch.float64)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    random_state, log = torch.get_rng_state(), module.training_module.log
    with alpha_hessian(module, batch) as product:
        found, other = product(v), product(v.flip(0))
        torch.testing.assert_close(v.flip(0) @ found, v @ other), "it is symmetric"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.training_module.log is log
    assert module.logged == []
    assert module.model.grad_checkpointing == checkpointing
    assert all(parameter.requires_grad for parameter in module.model.fc.parameters())

    def gradient(step):
        with torch.no_grad():
            for alpha, part in zip(alphas, v.split([alpha.numel() for alpha in alphas])):
                alpha.add_(part.view_as(alpha), alpha=step)
        loss = module.training_module.training_step(batch, 0)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, alphas)])

    plus, minus = gradient(1e-5), gradient(-2e-5)
    torch.testing.assert_close(found, (plus - minus) / 2e-5, rtol=1e-5, atol=1e-7)


class Fixed:
    """A search with a chosen sample for each epoch, and its trainer."""

    warmup_epochs, device = 1, torch.device("cpu")

    def __init__(self):
        self.current_epoch, self.should_stop = -1, False

    def arch_parameters(self):
        return [torch.zeros(2)]

    def export(self):
        return {"epoch": self.current_epoch}

    def end_epoch(self, stop):
        self.current_epoch += 1
        stop.on_train_batch_end(self, self, None, {"val": None}, 0)
        stop.on_train_epoch_end(self, self)


# the first epoch is a warm-up and has no value; a mean of two: 1, 1, 1, 1.15, 1.35
@pytest.mark.parametrize(
    ("values", "epochs", "chosen"),
    [([1, 1, 1, 1, 1.3, 1.4, 9], 6, 4), ([1, 1, 1, 1, 1, 1], None, None), ([-1, -1, -0.1, -0.1], None, None)],
)
def test_the_search_ends_when_the_mean_eigenvalue_has_grown_by_a_third(values, epochs, chosen, monkeypatch):
    remaining = iter(values)
    monkeypatch.setattr(collapse, "alpha_hessian", lambda module, batch: torch.no_grad())
    monkeypatch.setattr(collapse, "largest_eigenvalue", lambda *args: next(remaining))
    run, stop = Fixed(), EigenvalueStop(window=2)
    for _ in range(len(values) + 1):
        run.end_epoch(stop)
        again = EigenvalueStop(window=2)
        again.load_state_dict(json.loads(json.dumps(stop.state_dict())))
        stop = again
        if run.should_stop:
            break
    assert (run.current_epoch if run.should_stop else None) == epochs
    assert stop.sample == (None if chosen is None else {"epoch": chosen})


def test_skips_are_counted_where_they_show_a_collapse():
    names = ["skip_connect", "neg_skip_connect", "skip_connect", "sep_conv_3x3"]
    hb = {f"normal/op_{t}_{k}": names[k] for t in (2, 3) for k in range(3)}
    agd = {f"normal/op_{t}_{k}": names[k + t - 2] for t in (2, 3, 4) for k in range(2)}
    reduction = {label.replace("normal", "reduce"): name for label, name in {**hb, **agd}.items()}
    inputs = {f"normal/input_{t}_{k}": [k] for t in (2, 3, 4) for k in range(2)}
    assert count_skips(HBSpace(**TINY), {**hb, **reduction}) == 2, "± identities on the other edges are rule (26)"
    assert count_skips(AGDSpace(**{**TINY, "nodes": 3}), {**agd, **inputs, **reduction}) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipStop(0), "skips=0: must be an integer ≥ 1"),
        (lambda: EigenvalueStop(window=0), "window=0: must be an integer ≥ 1"),
        (lambda: EigenvalueStop(ratio=0), "ratio=0: must be > 0 and ≤ 1"),
        (lambda: FairDARTS(zero_one_weight=-1), "zero_one_weight=-1: must be ≥ 0"),
        (lambda: SearchSettings(early_stop="late"), "early_stop='late': must be one of never, skips, eigenvalue"),
        (lambda: SearchSettings(strategy="p-darts", early_stop="skips"), "early_stop='skips': must be 'never' with p-"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- searches ---------------------------------------------------------------------------------------------------------


def classify(space, strategy, epochs, *callbacks):
    """Search with NNI's own evaluator and engine."""
    loaders = make_loaders(read_images("digits", 64), 16, 0, padding=0)
    evaluator = Classification(
        train_dataloaders=loaders[0], val_dataloaders=loaders[1], num_classes=10, max_epochs=epochs,
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    return strategy.oneshot_module


@pytest.mark.parametrize("strategy", [DARTS, StockDARTS])
def test_nnis_evaluator_and_engine_take_both_callbacks(strategy):
    skips = {key: ["skip_connect"] for key in ("normal/op_2_0", "normal/op_3_0")}
    space = HBSpace(**TINY, allowed=skips)
    sharp, stop = EigenvalueStop(iterations=2), SkipStop(2)
    module = classify(space, strategy(), 3, sharp, stop)
    assert module.trainer.current_epoch == 1
    assert stop.sample == module.export()
    assert len(sharp.eigenvalues) == 1
    assert sharp.sample is None


def test_a_search_that_has_stopped_stays_so(tmp_path):
    skips = {key: ["skip_connect"] for key in ("normal/op_2_0", "normal/op_3_0")}
    settings = SearchSettings(**SETTINGS, epochs=3, early_stop="skips", allowed=skips)
    batches = []
    genotypes = [search(settings, tmp_path, accelerator="cpu", on_batch=lambda: batches.append(1)) for _ in range(2)]
    assert genotypes[0] == genotypes[1]
    (entry,) = read_history(tmp_path)
    assert entry["genotype"] == genotypes[0].to_dict()
    assert len(batches) == 2
    assert _early_end(tmp_path, settings) == ["The search ended after epoch 1 of 3, by --early-stop skips."]


def test_eigenvalues_of_a_resumed_search_are_those_of_an_uninterrupted_one(tmp_path, monkeypatch):
    """And the chosen cell is the same: a ratio of 1 and a window of 1 end the search at the first growth."""
    monkeypatch.setitem(search_module.STOPS, "eigenvalue", lambda: EigenvalueStop(window=1, ratio=0.999, iterations=3))
    settings = SearchSettings(**SETTINGS, epochs=4, alpha_lr=0.1, early_stop="eigenvalue")

    def stop_after(epoch):
        def on_epoch(entry):
            if entry["epoch"] == epoch:
                raise KeyboardInterrupt

        return on_epoch

    whole = search(settings, tmp_path / "whole", accelerator="cpu")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        search(settings, tmp_path / "parts", accelerator="cpu", on_epoch=stop_after(0))
    parts = search(settings, tmp_path / "parts", accelerator="cpu")
    histories = [read_history(tmp_path / name) for name in ("whole", "parts")]
    values = [[entry["alpha_eigenvalue"] for entry in history] for history in histories]
    assert values[0] == values[1]
    assert len(values[0]) >= 2
    assert parts == whole
    assert (tmp_path / "parts" / "genotype.json").read_bytes() == (tmp_path / "whole" / "genotype.json").read_bytes()
    grown = [after > before / 0.999 for before, after in zip(values[0], values[0][1:])]
    assert grown == [False] * (len(grown) - 1) + [len(values[0]) < 4], "it ended at the first growth, or not at all"
    assert page._notes(read_run(tmp_path / "whole")) == []
    if any(grown):
        assert whole.to_dict() == histories[0][-2]["genotype"]


# --- FairDARTS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
def test_weights_of_fair_darts_are_sigmoids_that_leave_one_half(kind):
    """∂/∂α −w/N Σ (σ − ½)² = −2w/N (σ − ½) σ (1 − σ)."""
    module, _batch = supernet(SPACES[kind](**TINY), FairDARTS(zero_one_weight=2.0))
    alphas = [alpha for part in module.supernet_modules() for alpha in part.arch_parameters()]
    with torch.no_grad():
        for alpha in module.arch_parameters():
            alpha.normal_()
    rows = module.probabilities()
    exported = module.export_probs()
    for label, row in rows.items():
        assert exported[label] == dict(zip(exported[label], row.tolist()))
    assert any(row.sum() > 1.5 for row in rows.values())
    module._add_penalty_gradient()
    total = sum(row.numel() for row in rows.values())
    found = [alpha for alpha in module.arch_parameters() if alpha.grad is not None]
    assert sum(alpha.numel() for alpha in found) == total
    assert {id(alpha) for alpha in found} <= {id(alpha) for alpha in alphas}
    for alpha in found:
        s = alpha.detach().sigmoid()
        torch.testing.assert_close(alpha.grad, -2 * 2.0 / total * (s - 0.5) * s * (1 - s))


@pytest.mark.parametrize("kind", SPACES)
def test_fair_darts_searches_in_nnis_engine(kind):
    space = SPACES[kind](**TINY)
    module = classify(space, FairDARTS(), 1)
    assert space.genotype(module.export()).rule == space.rule
    assert module.order == 1
