"""Multi-trial search: every strategy on every space, resumed by replay."""

import gc
import json
import pickle
import random
import signal
import weakref

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
from trial_runs import (
    STRATEGIES,
    TINY,
    count_parameters,
    digits,
    run,
    run_terminated,
    sized,
)

from nni_spaces import (
    TPE,
    AGDSpace,
    DARTSSpace,
    HBSpace,
    HeavyBallInit,
    RandomInit,
    TrialEvaluator,
    ZeroInit,
    read_trials,
    run_trials,
)
from nni_spaces.trials.evaluator import TrialModule
from optinspired_plugins import Genotype

SPACES = {"hb": HBSpace, "agd": AGDSpace, "darts": DARTSSpace}


def without_times(folder):
    settings, trials = read_trials(folder)
    return settings, [{**trial.to_dict(), "seconds": None} for trial in trials]


# --- strategies and spaces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_tries_networks_of_a_space(name, kind, tmp_path):
    space = SPACES[kind](**TINY)
    ranked = run_trials(space, STRATEGIES[name](), digits(epochs=2), tmp_path, 3)
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


# --- trials that fail -------------------------------------------------------------------------------------------------


def failing(index, fail, calls=None):
    """An evaluator that counts parameters, and lets one trial fail."""
    calls = [] if calls is None else calls

    def report(model):
        calls.append(model)
        if len(calls) - 1 == index:
            fail()
        count_parameters(model)

    return sized(report)


def raising(error):
    def fail():
        raise error

    return fail


def reporting(value, report=nni.report_final_result):
    def fail():
        report(value)

    return fail


def result_and_error():
    nni.report_final_result(1e9)  # the best of all, had it ended well
    raise RuntimeError("in the end")


FAULTS = {
    "memory": (raising(torch.OutOfMemoryError("CUDA out of memory.")), "OutOfMemoryError: CUDA out of memory."),
    "host memory": (raising(MemoryError()), "MemoryError: "),
    "divergence": (raising(FloatingPointError("loss=nan in epoch 1")), "FloatingPointError: loss=nan in epoch 1"),
    "mistake": (raising(KeyError("acc")), "KeyError: 'acc'"),
    "assertion": (raising(AssertionError("shape")), "AssertionError: shape"),
    "nan": (reporting(float("nan")), "FloatingPointError: result=nan: must be finite"),
    "infinity": (reporting(-np.inf), "FloatingPointError: result=-inf: must be finite"),
    "nan on the way": (
        reporting(torch.tensor(torch.nan), nni.report_intermediate_result),
        "FloatingPointError: result=tensor(nan): must be finite",
    ),
    "no number": (reporting({"acc": 1.0}), "TypeError: result={'acc': 1.0}: must be a number"),
    "after its result": (result_and_error, "RuntimeError: in the end"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_trial_that_fails_is_recorded_and_the_run_goes_on(fault, tmp_path):
    """And the next process is told the same of it, without a second try: the strategy asks for the same networks."""
    fail, error = FAULTS[fault]

    def search(folder, counts):
        calls = []
        for count in counts:
            ranked = run_trials(HBSpace(**TINY), STRATEGIES["evolution"](), failing(1, fail, calls), folder, count)
        assert len(calls) == counts[-1]
        return ranked

    ranked = search(tmp_path / "whole", [4])
    search(tmp_path / "parts", [2, 4])
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "whole")
    trials = read_trials(tmp_path / "whole")[1]
    assert [trial.error for trial in trials] == [None, error, None, None]
    assert trials[1].metric is None
    assert sorted(ranked, key=lambda trial: trial.index) == [trial for trial in trials if trial.index != 1]


def test_a_trial_without_a_result_fails(tmp_path):
    calls = []

    def report(model):
        calls.append(model)
        if len(calls) != 2:
            count_parameters(model)

    run_trials(HBSpace(**TINY), Random(seed=0), sized(report), tmp_path, 3)
    assert [trial.error for trial in read_trials(tmp_path)[1]] == [
        None, "RuntimeError: evaluator: reported no result, must call nni.report_final_result", None
    ]  # fmt: skip


def test_a_failed_trial_changes_no_other(tmp_path, monkeypatch):
    """In Lightning, in the middle of an epoch; its traceback is logged, that of a divergence is not."""
    steps = []

    class Failing(TrialModule):
        def training_step(self, batch, batch_idx):
            steps.append(self.model)
            if len(steps) == 3 + 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    run_trials(HBSpace(**TINY), Random(seed=0), digits(), tmp_path / "whole", 3)
    monkeypatch.setattr(TrialEvaluator, "_module", lambda self: Failing(**self.recipe))
    run_trials(HBSpace(**TINY), Random(seed=0), digits(), tmp_path / "one failed", 3)
    (_, whole), (_, others) = without_times(tmp_path / "whole"), without_times(tmp_path / "one failed")
    assert others[1]["error"] == "OutOfMemoryError: CUDA out of memory."
    assert (others[0], others[2]) == (whole[0], whole[2])


@pytest.mark.parametrize(("fault", "traced"), [("divergence", False), ("nan", False), ("mistake", True)])
def test_a_failed_trial_is_logged_with_its_traceback_unless_it_diverged(fault, traced, tmp_path, caplog):
    run_trials(HBSpace(**TINY), Random(seed=0), failing(0, FAULTS[fault][0]), tmp_path, 2)
    (record,) = [record for record in caplog.records if record.name == "nni_spaces.trials.run"]
    assert record.getMessage() == f"Trial 0: {FAULTS[fault][1]}"
    assert bool(record.exc_info) == traced


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
    assert {trial.error for trial in diverged} == {"FloatingPointError: loss=nan in epoch 1, step 1: must be finite"}
    assert {trial.index for trial in ranked} == {trial.index for trial in trials} - {t.index for t in diverged}
    assert len(search(7)) >= len(ranked), "the strategy is told of them again"


def test_a_loss_that_is_not_finite_is_found(tmp_path):
    message = r"none of 1 trials has a result; FloatingPointError: loss=nan in epoch 1, step \d+: must be finite"
    with pytest.raises(RuntimeError, match=message):
        run_trials(HBSpace(**TINY), Random(seed=0), digits(lr=1e30, gradient_clip=1e30), tmp_path, 1)
    assert read_trials(tmp_path)[1][0].metric is None


@pytest.mark.parametrize(
    ("error", "recorded"),
    [
        (OSError("the disk is gone"), 2),
        (FileNotFoundError("images.npz"), 2),
        (KeyboardInterrupt("by hand"), 2),
        (RuntimeError("CUDA error: device-side assert triggered"), 3),
    ],
)
def test_what_is_no_networks_fault_ends_the_run_and_keeps_the_trials(error, recorded, tmp_path):
    """The next run repeats the trial, or goes on behind the one that the device did not survive."""
    with pytest.raises(type(error), match=str(error)):
        run_trials(HBSpace(**TINY), Random(seed=0), failing(2, raising(error)), tmp_path, 4)
    assert len(read_trials(tmp_path)[1]) == recorded
    assert len(run_trials(HBSpace(**TINY), Random(seed=0), sized(), tmp_path, 4)) == 4 - (recorded - 2)


def test_trials_that_have_all_failed_say_so_and_bind_nothing(tmp_path):
    def broken(model):
        raise NameError("name 'acuracy' is not defined\n\x1b[2J")

    def search(strategy, evaluator, count):
        return run_trials(HBSpace(**TINY), strategy, evaluator, tmp_path, count)

    for _ in range(2):  # the same run once more tries all again
        with pytest.raises(
            RuntimeError, match=r"none of 2 trials has a result; NameError: name 'acuracy' is not defined\\n\\x1b\[2J$"
        ):
            search(Random(seed=0), sized(broken), 2)
    assert len(search(Random(seed=0), sized(), 2)) == 2
    with pytest.raises(ValueError, match="holds trials with strategy='Random'"):
        search(RegularizedEvolution(), sized(), 2)


def test_failed_trials_are_not_tried_again_before_all_have_failed(tmp_path):
    calls = []
    with pytest.raises(RuntimeError, match="none of 1 trials"):
        run_trials(HBSpace(**TINY), Random(seed=0), failing(0, FAULTS["memory"][0], calls), tmp_path, 1)
    assert len(run_trials(HBSpace(**TINY), Random(seed=0), failing(0, FAULTS["memory"][0], calls), tmp_path, 3)) == 2
    assert len(calls) == 3


def test_the_network_before_is_freed_for_the_next(monkeypatch, tmp_path):
    alive = []

    class Noted(TrialModule):
        def on_fit_start(self):
            alive.append(weakref.ref(self.model))
            assert [ref() is not None for ref in alive] == [False] * (len(alive) - 1) + [True]

    monkeypatch.setattr(TrialEvaluator, "_module", lambda self: Noted(**self.recipe))
    gc.disable()
    try:
        assert len(run_trials(HBSpace(**TINY), Random(seed=0), digits(), tmp_path, 3)) == 3
    finally:
        gc.enable()


# --- the end of the process -------------------------------------------------------------------------------------------


def status_of(folder, moment):
    process = processes.Process(target=run_terminated, args=(folder, moment))
    process.start()
    process.join(300)
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert status_of(folder, None) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "status"),
    [
        ("batch", 128 + signal.SIGTERM),
        ("loader", 128 + signal.SIGTERM),  # a loader process that gets the signal too dies at once
        ("end", 128 + signal.SIGTERM),  # after the last batch, where Lightning looks no more
        ("between", -signal.SIGTERM),  # 143 to a shell
    ],
)
def test_a_terminated_run_says_so_and_goes_on(moment, status, uninterrupted, tmp_path):
    assert status_of(tmp_path, moment) == status
    assert len(read_trials(tmp_path)[1]) == 1
    assert status_of(tmp_path, None) == 0
    assert without_times(tmp_path) == without_times(uninterrupted)
    assert (tmp_path / "genotype.json").read_bytes() == (uninterrupted / "genotype.json").read_bytes()


@pytest.mark.parametrize(("code", "status"), [(None, 143), (0, 143), (3, 3)])
def test_a_trial_that_ends_the_process_never_says_that_the_run_has_finished(code, status, tmp_path):
    """Lightning's trainers in evaluators of others end it without a code at SIGTERM."""
    with pytest.raises(SystemExit) as stop:
        run_trials(HBSpace(**TINY), Random(seed=0), failing(1, raising(SystemExit(code))), tmp_path, 3)
    assert stop.value.code == status
    assert len(read_trials(tmp_path)[1]) == 1


# --- what goes wrong --------------------------------------------------------------------------------------------------


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


def test_held_out_images_are_not_trained_on():
    evaluator = digits()
    train, val = evaluator.train_dataloaders.dataset, evaluator.val_dataloaders.dataset
    assert (len(train), len(val)) == (51, 13)
    every = torch.cat([part.images[part.indices] for part in (train, val)]).flatten(1)
    assert len(every.unique(dim=0)) == 64
    assert sum(len(labels) for _, labels in evaluator.val_dataloaders) == 13, "none is left out"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hb", dict(initialization=HeavyBallInit()), r"initialization=HeavyBallInit\(logit=5.0, std=0.001\) with str"),
        ("agd", dict(initialization=RandomInit(0.5)), r"initialization=RandomInit\(std=0.5\) with strategy=\w+, which"),
        ("hb", dict(partial_channels=2), r"partial_channels=2 with strategy=\w+: must be 1"),
        ("darts", dict(skip_dropout=0.4), r"skip_dropout=0.4 with strategy=\w+: must be 0"),
        ("agd", dict(allowed={"normal/2_0": ["skip_connect"]}), r"allowed with strategy=\w+: NNI's cell has one list"),
    ],
)
def test_options_of_supernets_are_refused_where_networks_are_sampled(kind, options, message, tmp_path):
    space = SPACES[kind](**TINY, **options)
    for strategy in (Random(), RegularizedEvolution()):
        with pytest.raises(ValueError, match=message):
            run_trials(space, strategy, sized(), tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_equal_chances_are_what_sampled_networks_have(tmp_path):
    assert len(run_trials(HBSpace(**TINY, initialization=ZeroInit()), Random(seed=0), sized(), tmp_path, 1)) == 1
