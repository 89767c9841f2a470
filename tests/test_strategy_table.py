"""The tables of docs/guide/strategies.md: what they say works is run, and errors name what they list."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from extras import needs

needs("nni", "sklearn")

from nni.nas.evaluator.pytorch import Classification
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace, SimplifiedModelSpace
from nni.nas.strategy import Random
from trial_runs import digits, sized

from nni_spaces import AGDSpace, HBSpace, run_trials
from nni_spaces.runs.data import make_loaders, read_images

VERDICT = re.compile("works$|error: use `")
PAGE = Path(__file__).parents[1] / "docs" / "guide" / "strategies.md"
TINY = dict(channels=2, cells=3, nodes=2, in_chans=1, operations=["skip_connect", "max_pool_3x3", "dil_conv_3x3"])
SPACES = {"fixed edges": HBSpace, "chosen sources": AGDSpace}
ARGUMENTS = {
    "PolicyBasedRL": dict(samples_per_update=1),
    "RegularizedEvolution": dict(population_size=1, sample_size=1),
}


def rows():
    """Strategy, kind of space and verdict of every row."""
    for name, *verdicts in re.findall(r"^\| `([\w.]+)` \| ([^|]*) \| ([^|]*) \|", PAGE.read_text(), flags=re.MULTILINE):
        yield from ((name, kind, verdict) for kind, verdict in zip(SPACES, verdicts) if VERDICT.match(verdict))


ROWS = list(rows())


def classification():
    """NNI's evaluator for a step on digits."""
    loaders = make_loaders(read_images("digits", 32), 16, 0, padding=0)
    return Classification(
        train_dataloaders=loaders[0], val_dataloaders=loaders[1], num_classes=10, max_epochs=1, accelerator="cpu",
        devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def run(strategy, space, folder):
    """Run a strategy as its table says, and return a genotype that it found."""
    if hasattr(strategy, "mutate_model"):  # it makes a supernet
        strategy(RawFormatModelSpace(space, classification()), SequentialExecutionEngine())
        return space.genotype(strategy.oneshot_module.export())
    count = 2 if hasattr(strategy, "mutation_prob") else 1  # a mutation is the second
    return run_trials(space, strategy, sized(), folder, count)[0].genotype


def test_the_tables_have_every_strategy_of_nni():
    module = import_module("nni.nas.strategy")
    stock = {name for name in vars(module) if isinstance(getattr(module, name), type)} - {"Strategy", "TPEStrategy"}
    assert {name.rpartition(".")[2] for name, _, _ in ROWS if name.startswith("nni.nas")} == stock
    assert len(ROWS) == 2 * len({name for name, _, _ in ROWS})


@pytest.mark.parametrize(("name", "kind", "verdict"), ROWS, ids=lambda text: str(text)[:30])
def test_a_row_is_true(name, kind, verdict, tmp_path):
    module, _, attribute = name.rpartition(".")
    if attribute == "PolicyBasedRL":
        needs("tianshou")
    strategy = getattr(import_module(module), attribute)(**ARGUMENTS.get(attribute, {}))
    space = SPACES[kind](**TINY)
    if verdict == "works":
        assert run(strategy, space, tmp_path).rule == space.rule
        return
    with pytest.raises(ValueError, match=f"^strategy={attribute}: ") as error:
        run(strategy, space, tmp_path)
    advice = re.findall(r"`([\w.]+)`", verdict)
    assert advice
    assert [word for word in advice if word not in str(error.value)] == []


@pytest.mark.parametrize("form", [RawFormatModelSpace, SimplifiedModelSpace])
def test_the_second_network_of_nnis_own_evaluator_is_an_error_that_says_why(form):
    """It was ``KeyError: 'val_acc'``, and the networks were not trained."""
    space = HBSpace(**TINY)
    engine = SequentialExecutionEngine(max_model_count=2)
    with pytest.raises(
        ValueError, match=r"evaluator=Classification: NNI's trainer has .* one network .* TrialEvaluator"
    ):
        Random(seed=0)(form.from_model(space, classification()), engine)
    first, _ = engine.list_models()
    assert first.metric is not None
    assert space.freeze(first.sample)(torch.zeros(1, 1, 8, 8)).shape == (1, 10), "afterwards, networks can be made"


def test_our_evaluator_trains_every_network_of_nnis_engine():
    engine = SequentialExecutionEngine(max_model_count=2)
    Random(seed=0)(SimplifiedModelSpace.from_model(HBSpace(**TINY), digits()), engine)
    assert [model.metric is not None for model in engine.list_models()] == [True, True]
