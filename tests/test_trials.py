"""Multi-trial search: every strategy on every space, resumed by replay."""

import json
import pickle
import random
import signal

import numpy as np
import pytest
import torch
from extras import needs

needs("nni", "sklearn")

import nni
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import TPE as StockTPE
from nni.nas.strategy import Random, RegularizedEvolution
from test_nni_search import processes
from trial_runs import STRATEGIES, TINY, count_parameters, count_updates, digits, needs_tianshou, run, sized

from nni_spaces import (
    ENAS,
    TPE,
    AGDSpace,
    DARTSSpace,
    HBSpace,
    PolicyRL,
    TrialEvaluator,
    read_trials,
    run_trials,
    sequential_config,
)
from optinspired_plugins import Genotype

SPACES = {"hb": HBSpace, "agd": AGDSpace, "darts": DARTSSpace}
RL = dict(samples_per_update=2, update_kwargs=dict(batch_size=8, repeat=1, update_times=1))


def without_times(folder):
    settings, trials = read_trials(folder)
    return settings, [{**trial.to_dict(), "seconds": None} for trial in trials]


# --- strategies and spaces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("name", [*STRATEGIES, "policy"])
def test_a_strategy_tries_networks_of_a_space(name, kind, tmp_path):
    if name == "policy":
        needs_tianshou()
    strategy = PolicyRL(**RL) if name == "policy" else STRATEGIES[name]()
    space = SPACES[kind](**TINY)
    ranked = run_trials(space, strategy, digits(epochs=2), tmp_path, 3)
    _, trials = read_trials(tmp_path)
    assert sorted(ranked, key=lambda trial: trial.index) == trials
    assert len({trial.genotype for trial in trials}) == 3
    assert [trial.metric for trial in ranked] == sorted((trial.metric for trial in trials), reverse=True)
    for trial in trials:
        assert trial.genotype.rule == space.rule
        assert trial.genotype.nodes == 2
        assert len(trial.intermediate) == 2
        assert trial.intermediate[-1] == trial.metric
        assert trial.metric * 13 / 100 == pytest.approx(round(trial.metric * 13 / 100), abs=1e-4), "of 13 images"
    assert Genotype.load(tmp_path / "genotype.json") == ranked[0].genotype


@pytest.mark.parametrize("kind", SPACES)
def test_enas_learns_to_sample_a_space(kind):
    needs_tianshou()
    torch.manual_seed(0)
    space, evaluator = SPACES[kind](**TINY), digits()
    strategy = ENAS(batches_per_update=1, update_kwargs=dict(batch_size=8, repeat=1, update_times=1))
    updates = count_updates(strategy)
    strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    assert space.genotype(strategy.oneshot_module.export()).rule == space.rule
    assert updates == ["val"], "one batch is held out"
    assert "val_top1" in evaluator.trainer.callback_metrics


@pytest.mark.slow
def test_tpe_tries_networks_of_the_heavy_ball_space(tmp_path):
    ranked = run_trials(HBSpace(**TINY), TPE(seed=0), digits(), tmp_path, 2)
    assert {trial.genotype.rule for trial in ranked} == {"hb"}
    assert len(ranked) == 2


@pytest.mark.parametrize("kind", ["agd", "darts"])
def test_tpe_says_where_it_begins_that_it_cannot_choose_inputs(kind, tmp_path):
    space = RawFormatModelSpace(SPACES[kind](**TINY), sized())
    engine = SequentialExecutionEngine(max_model_count=1)
    with pytest.raises(NotImplementedError, match="as_legacy_dict is not implemented"):  # all that NNI says
        StockTPE()(space, engine)
    message = r"NNI's tuners have no CategoricalMultiple, which 'normal/input_2_0' is: .* need Random or Regularized"
    with pytest.raises(ValueError, match=message):
        TPE().initialize(space, engine)
    with pytest.raises(ValueError, match=message):
        run_trials(SPACES[kind](**TINY), TPE(), sized(), tmp_path, 1)
    assert list(engine.list_models()) == []
    assert not list(tmp_path.iterdir())


# --- the same result --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_and_resumed_in_another_process_it_is_the_uninterrupted_search(strategy, tmp_path):
    run(tmp_path / "whole", strategy, 4)
    for kill_at, code, trials in ((1, -signal.SIGKILL, 2), (2, -signal.SIGKILL, 3), (None, 0, 4)):
        process = processes.Process(target=run, args=(tmp_path / "killed", strategy, 4, kill_at))
        process.start()
        process.join(300)
        assert process.exitcode == code
        assert len(read_trials(tmp_path / "killed")[1]) == trials
        assert (tmp_path / "killed" / "genotype.json").exists() == (trials == 4)
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")
    genotypes = [(tmp_path / name / "genotype.json").read_bytes() for name in ("killed", "whole")]
    assert genotypes[0] == genotypes[1]


def test_a_policys_trials_resume_too(tmp_path):
    needs_tianshou()
    for folder, counts in (("whole", [6]), ("parts", [3, 6])):
        for count in counts:
            run_trials(HBSpace(**TINY), PolicyRL(**RL), sized(), tmp_path / folder, count)
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "whole")


def test_a_run_that_goes_on_trains_no_network_again(tmp_path):
    seen = []

    def report(model):
        seen.append(model)
        nni.report_intermediate_result(1.0)
        count_parameters(model)

    for count in (2, 2, 5, 3):
        ranked = run_trials(HBSpace(**TINY), STRATEGIES["evolution"](), sized(report), tmp_path, count)
        assert len(ranked) == count
    assert len(seen) == 5 == len(read_trials(tmp_path)[1])


def test_random_states_are_as_they_were(tmp_path):
    space, evaluator = HBSpace(**TINY), digits()
    states = [torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()), random.getstate()]
    run_trials(space, Random(seed=0), evaluator, tmp_path, 1)
    assert [torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()), random.getstate()] == states


def test_weights_are_a_function_of_seed_and_trial(tmp_path):
    def weights(seed, folder):
        found = []

        def report(model):
            found.append(model.fc.weight.detach().clone())
            count_parameters(model)

        run_trials(HBSpace(**TINY), Random(seed=0), sized(report), folder, 2, seed)
        return found

    first, again, other = (weights(seed, tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_network_that_diverges_is_recorded_and_the_search_goes_on(tmp_path):
    def report(model):
        if any(isinstance(m, torch.nn.MaxPool2d) for m in model.modules()):
            raise FloatingPointError("loss=nan in epoch 1, step 1: must be finite")
        count_parameters(model)

    def search(count):
        return run_trials(HBSpace(**TINY), STRATEGIES["evolution"](), sized(report), tmp_path, count)

    ranked, (_, trials) = search(5), read_trials(tmp_path)
    diverged = [trial for trial in trials if trial.metric is None]
    assert 0 < len(diverged) < 5
    assert {trial.error for trial in diverged} == {"loss=nan in epoch 1, step 1: must be finite"}
    assert {trial.index for trial in ranked} == {trial.index for trial in trials} - {t.index for t in diverged}
    assert len(search(7)) >= len(ranked), "the strategy is told of them again"


def test_a_loss_that_is_not_finite_is_found(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"none of 1 trials has a result; loss=nan in epoch 1, step \d+: must be fin"
    ):
        run_trials(HBSpace(**TINY), Random(seed=0), digits(lr=1e30, gradient_clip=1e30), tmp_path, 1)
    assert read_trials(tmp_path)[1][0].metric is None


def test_any_other_error_ends_the_run_and_keeps_the_trials(tmp_path):
    calls = []

    def report(model):
        calls.append(model)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        count_parameters(model)

    with pytest.raises(OSError, match="the disk is gone"):
        run_trials(HBSpace(**TINY), Random(seed=0), sized(report), tmp_path, 4)
    assert len(read_trials(tmp_path)[1]) == 2
    with pytest.raises(
        RuntimeError, match=r"evaluator: reported no result of trial 2, must call nni.report_final_resu"
    ):
        run_trials(HBSpace(**TINY), Random(seed=0), sized(lambda model: None), tmp_path, 4)
    with pytest.raises(ValueError, match=r"trial 2 has .*nan.*: must be finite numbers"):
        run_trials(HBSpace(**TINY), Random(seed=0), sized(lambda m: nni.report_final_result(np.nan)), tmp_path, 4)
    assert len(run_trials(HBSpace(**TINY), Random(seed=0), sized(), tmp_path, 4)) == 4


def test_a_folder_of_other_trials_is_refused(tmp_path):
    run_trials(HBSpace(**TINY), Random(seed=0), sized(), tmp_path, 2)
    before = (tmp_path / "trials.json").read_bytes()
    cases = {
        r"strategy: asks for another network than it did in trial 0; .* same seed": dict(strategy=Random(seed=1)),
        r"holds trials with strategy='Random' \(here 'RegularizedEvolution'\)": dict(strategy=RegularizedEvolution()),
        r"holds trials with space='HBSpace' \(here 'AGDSpace'\)": dict(space=AGDSpace(**TINY)),
        r"holds trials with evaluator='FunctionalEvaluator' \(here 'TrialEvaluator": dict(evaluator=digits()),
        r"holds trials with seed=0 \(here 1\)": dict(seed=1),
    }
    for message, change in cases.items():
        options = dict(space=HBSpace(**TINY), strategy=Random(seed=0), evaluator=sized(), out=tmp_path, trials=2)
        with pytest.raises(ValueError, match=message):
            run_trials(**{**options, **change})
    assert (tmp_path / "trials.json").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        dict(channels=8),
        dict(cells=4),
        dict(nodes=3),
        dict(in_chans=3),
        dict(num_classes=5),
        dict(stem="imagenet"),
        dict(operations=["skip_connect", "sep_conv_3x3"]),
        dict(allowed={"normal/op_2_0": ["skip_connect"]}),
    ],
)
def test_trials_of_a_space_of_other_arguments_are_refused(change, tmp_path):
    run_trials(HBSpace(**TINY), Random(seed=0), sized(), tmp_path, 1)
    (name,) = change
    with pytest.raises(ValueError, match=rf"holds trials with {name}=.* \(here .*\): choose another folder"):
        run_trials(HBSpace(**{**TINY, **change}), Random(seed=0), sized(), tmp_path, 2)


def test_trials_on_other_images_are_refused(tmp_path):
    images = torch.randint(256, (64, 8, 8, 1), dtype=torch.uint8).numpy()
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(64) % 10)

    def evaluator(source="digits", **options):
        return TrialEvaluator.from_images(source, limit=64, accelerator="cpu", **{"batch_size": 16, **options})

    def tried(judge):
        return run_trials(HBSpace(**TINY), Random(seed=0), judge, tmp_path / "run", 1)

    judge = evaluator()
    assert tried(judge) == tried(evaluator())
    for name, other in (
        ("images", evaluator(tmp_path / "a.npz")),
        ("images", TrialEvaluator(judge.train_dataloaders, judge.val_dataloaders)),
        ("batch_size", evaluator(batch_size=32)),
        ("padding", evaluator(padding=1)),
        ("images_seed", evaluator(seed=1)),
        ("held_out", evaluator(held_out=0.201)),
    ):
        with pytest.raises(ValueError, match=rf"holds trials with {name}="):
            tried(other)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: "{",
        lambda data: [],
        lambda data: {"settings": {}},
        lambda data: {**data, "trials": [{**data["trials"][0], "metric": None}]},
        lambda data: {**data, "trials": [{**data["trials"][0], "metric": "high"}]},
        lambda data: {**data, "trials": [{**data["trials"][0], "index": 1}]},
        lambda data: {**data, "trials": [{**data["trials"][0], "genotype": {}}]},
        lambda data: {**data, "trials": [{**data["trials"][0], "colour": "red"}]},
    ],
)
def test_damaged_trials_are_refused(damage, tmp_path):
    run_trials(HBSpace(**TINY), Random(seed=0), sized(), tmp_path, 1)
    path = tmp_path / "trials.json"
    found = damage(json.loads(path.read_text()))
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(ValueError, match=r"trials.json: not the trials of a run \("):
        run_trials(HBSpace(**TINY), Random(seed=0), sized(), tmp_path, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=0), "epochs=0: must be an integer ≥ 1"),
        (dict(lr=0), "lr=0: must be a positive number"),
        (dict(gradient_clip=float("inf")), "gradient_clip=inf: must be a positive number"),
        (dict(momentum=-1), "momentum=-1: must be ≥ 0"),
        (dict(held_out=1.0), "held_out=1.0: must leave images on both sides, of 64"),
        (dict(held_out=0), "held_out=0: must leave images on both sides"),
        (dict(held_out=0.9), "batch_size=16: must be at most 6, the images to train on"),
    ],
)
def test_wrong_evaluators_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        digits(**options)


def test_wrong_runs_are_named(tmp_path):
    with pytest.raises(ValueError, match="trials=0: must be an integer ≥ 1"):
        run_trials(HBSpace(**TINY), Random(), sized(), tmp_path, 0)
    with pytest.raises(ValueError, match="trials=0: must be an integer ≥ 1"):
        sequential_config(tmp_path, 0)
    with pytest.raises(ValueError, match="space has 'none' to choose, which no genotype can hold"):
        run_trials(HBSpace(**TINY, zero_in_space=True), Random(), sized(), tmp_path, 1)


def test_held_out_images_are_not_trained_on():
    evaluator = digits()
    train, val = evaluator.train_dataloaders.dataset, evaluator.val_dataloaders.dataset
    assert (len(train), len(val)) == (51, 13)
    every = torch.cat([train.images, val.images]).flatten(1)
    assert len(every.unique(dim=0)) == 64
    assert sum(len(labels) for _, labels in evaluator.val_dataloaders) == 13, "none is left out"
