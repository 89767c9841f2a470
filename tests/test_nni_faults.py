"""Faults of NNI 3.0 that are mended here, each shown by NNI's own class: what no longer fails there can go here.

The order of α, which a resumed search needs, is in test_nni_strategies.py; TPE's spaces are in test_trials.py.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extras import needs

needs("nni", "sklearn")

from nni.nas.evaluator.pytorch import Classification, Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.profiler.pytorch.flops import NumParamsProfiler
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import TPE as StockTPE
from nni.nas.strategy import Random, RandomOneShot
from nni.nas.utils.serializer import TorchSerializer
from trial_runs import STRATEGIES, TINY, digits, sized

from nni_spaces import TPE, HBSpace, TrialEvaluator, run_trials
from nni_spaces.trials.evaluator import TrialModule
from optinspired_plugins import Genotype


def execute(*args, home):
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env |= {"HOME": str(home), "MPLCONFIGDIR": str(home.parent / "matplotlib")}
    command = [sys.executable, str(root / "tests" / "trial_runs.py"), *map(str, args)]
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)


def loaders():
    evaluator = digits()
    return dict(train_dataloaders=evaluator.train_dataloaders, val_dataloaders=evaluator.val_dataloaders)


QUIET = dict(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip


class Counted(TrialModule):
    """Notes the network of every step."""

    steps = []

    def training_step(self, batch, batch_idx):
        self.steps.append(self.model)
        return super().training_step(batch, batch_idx)


def test_nnis_profilers_know_no_shapes_of_a_space_and_its_penalty_has_no_gradient():
    with pytest.raises(RuntimeError, match="no shape inference formula"):
        NumParamsProfiler(HBSpace(**TINY), torch.zeros(1, 1, 8, 8))

    class Space(ModelSpace):
        def __init__(self):
            super().__init__()
            self.layer = LayerChoice([torch.nn.Linear(2, 2), torch.nn.ReLU()], label="layer")

    given = StockDARTS().mutate_model(Space()).layer.export_probs({})
    assert [type(probability) for probability in given["layer"].values()] == [float, float]


def test_nnis_evaluator_trains_one_network_and_ours_all(monkeypatch, tmp_path):
    """Its trainer has reached its last epoch when the second network comes; without our check nothing says so."""
    monkeypatch.setattr("nni_spaces.spaces.space.check_trainer", lambda: None)
    monkeypatch.setattr(Counted, "steps", [])
    recipe = digits().recipe
    stock = Lightning(Counted(**recipe), Trainer(**QUIET), **loaders())
    space, engine = HBSpace(**TINY), SequentialExecutionEngine(max_model_count=3)
    Random(seed=0)(RawFormatModelSpace(space, stock), engine)
    assert len(engine.list_models()) == 3
    assert len(Counted.steps) == 3, "the batches of one network"
    with pytest.raises(ValueError, match=r"evaluator=Lightning: .* trains no other; use TrialEvaluator"):
        run_trials(space, Random(seed=0), stock, tmp_path, 3)
    with pytest.raises(KeyError, match="_acc"):
        Random(seed=0)(
            RawFormatModelSpace(HBSpace(**TINY), Classification(**loaders(), **QUIET, num_classes=10)),
            SequentialExecutionEngine(max_model_count=2),
        )

    monkeypatch.setattr(TrialEvaluator, "_module", lambda self: Counted(**self.recipe))
    Counted.steps.clear()
    run_trials(space, Random(seed=0), digits(), tmp_path, 3)
    assert len(Counted.steps) == 3 * 3
    assert len(set(Counted.steps)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_every_network_sees_the_same_batches(workers, monkeypatch):
    """Also of loader processes that are kept: they ask for images before Lightning names the epoch."""
    seen = []

    class Noted(TrialModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch[1].tolist())
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(TrialEvaluator, "_module", lambda self: Noted(**self.recipe))
    evaluator = digits(epochs=2, workers=workers)
    for _ in range(2):
        evaluator.evaluate(HBSpace(**TINY).freeze(GENOTYPE.to_nni()))
    assert len(seen) == 2 * 2 * 3
    assert seen[:6] == seen[6:]
    assert seen[:3] != seen[3:6], "an epoch has an order of its own"


EDGES = (("sep_conv_3x3", 1), ("skip_connect", 1), ("max_pool_3x3", 0))
NODES = (EDGES, tuple((name, source + 1) for name, source in EDGES))
GENOTYPE = Genotype("hb", NODES, NODES)


def test_nnis_tpe_looks_for_the_lowest_result_and_ours_for_the_highest():
    """Both are told how many convolutions they chose; six of twelve would be chosen at random."""
    last = {}
    for name, strategy in (("stock", StockTPE(seed=0)), ("ours", TPE(seed=0))):
        tuner = strategy.tuner
        tuner.update_search_space({k: mutable.as_legacy_dict() for k, mutable in HBSpace(**TINY).simplify().items()})
        tuner.dedup = lambda sample: sample  # a grid, from where it first repeats itself, would hide what it looks for
        results = []
        for i in range(60):
            sample = tuner.generate_parameters(i)
            results.append(sum("conv" in operation for operation in sample.values()))
            tuner.receive_trial_result(i, sample, results[-1])
        last[name] = sum(results[-20:]) / 20
    assert last["stock"] < 4
    assert last["ours"] > 8


def test_nnis_tpe_is_refused_and_so_is_what_samples_no_networks(tmp_path):
    cases = {
        r"strategy=TPE: looks for the lowest result": StockTPE(),
        r"strategy=RandomOneShot: trains one supernet, must be one that samples networks": RandomOneShot(),
    }
    for message, strategy in cases.items():
        with pytest.raises(ValueError, match=message):
            run_trials(HBSpace(**TINY), strategy, sized(), tmp_path, 1)


def test_nnis_own_state_cannot_be_loaded(tmp_path):
    """It is a pickle of its classes, which torch no longer reads; trials.json needs none."""
    strategy = STRATEGIES["evolution"]()
    strategy(RawFormatModelSpace(HBSpace(**TINY), sized()), SequentialExecutionEngine(max_model_count=3))
    TorchSerializer().save(strategy.state_dict(), tmp_path / "state.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        TorchSerializer().load(tmp_path / "state.ckpt")


@pytest.mark.slow
def test_trials_leave_the_home_directory_alone_and_bind_no_address(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    done = execute(tmp_path / "run", "random", 1, home=home)
    assert "bound []\n" in done.stdout, done.stderr
    assert not list(home.rglob("*"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "genotype.json", "trials.json"]
