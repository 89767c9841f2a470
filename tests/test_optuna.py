"""Trials of Optuna on the spaces: samplers, workers that share a study, and a study as a folder of trials."""

import re
import signal

import pytest
from extras import needs

needs("nni", "sklearn", "optuna")

import optuna
from optuna.trial import TrialState
from optuna_worker import open_study, work
from test_examples import run_script
from test_nni_search import processes
from test_report import page_of
from trial_runs import TINY, digits

from nni_spaces import AGDSpace, AlgorithmSpace, HBSpace, read_trials, save_study, suggest_sample
from optinspired_plugins import Genotype

optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACES = {"hb": HBSpace, "agd": AGDSpace, "ogm": lambda **options: AlgorithmSpace("ogm", **options)}
SAMPLERS = {
    "random": optuna.samplers.RandomSampler,
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=4),
    "evolution": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=4),
}


def size_of(space):
    return lambda trial: space.count(suggest_sample(trial, space), 8).parameters


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_study_samples_networks_of_a_space_and_is_exported(sampler, kind, tmp_path):
    space = SPACES[kind](**TINY)
    study = optuna.create_study(sampler=SAMPLERS[sampler](seed=0), direction="maximize")
    study.optimize(size_of(space), n_trials=8)
    ranked = save_study(study, space, tmp_path)
    settings, trials = read_trials(tmp_path)
    assert [trial.metric for trial in trials] == [trial.value for trial in study.trials]
    assert ranked[0].metric == study.best_value
    assert Genotype.load(tmp_path / "genotype.json") == ranked[0].genotype == space.genotype(study.best_params)
    assert ranked[0].genotype.rule == space.rule
    assert settings["strategy"] == type(study.sampler).__name__
    assert settings["channels"] == TINY["channels"]


def test_trials_of_every_end_are_rows(tmp_path):
    space = HBSpace(**TINY)

    def objective(trial):
        suggest_sample(trial, space)
        trial.report(10.0 + trial.number, 0)
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 2:
            raise FloatingPointError("loss=nan")
        return 20.0 - trial.number

    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=4, catch=FloatingPointError)
    study.enqueue_trial({})  # one that waits is no row
    ranked = save_study(study, space, tmp_path)
    rows = [(trial.metric, trial.intermediate, trial.error) for trial in read_trials(tmp_path)[1]]
    assert rows == [
        (20.0, [10.0], None),
        (None, [11.0], "pruned as trial 1 of the study"),
        (None, [12.0], "fail as trial 2 of the study"),
        (17.0, [13.0], None),
    ]
    assert [trial.index for trial in ranked] == [0, 3]
    page = page_of(tmp_path)
    assert page.texts["verdict"].strip().startswith("20\n")
    assert "Result of trial 0, the best of 2." in page.texts["verdict"]
    assert "Trials42 without a result" in page.texts["verdict"]
    order = [attributes["id"] for tag, attributes in page.tags if tag == "tr" and "id" in attributes]
    assert order == ["trial-0", "trial-3", "trial-1", "trial-2"]
    assert "fail as trial 2 of the study" in page.texts["trials"]


def test_studies_that_do_not_fit_are_named(tmp_path):
    for directions in (["maximize", "minimize"], ["minimize"]):
        study = optuna.create_study(directions=directions)
        message = f"study={study.study_name!r} has directions={directions}: must be ['maximize']"
        with pytest.raises(ValueError, match=re.escape(message)):
            save_study(study, HBSpace(**TINY), tmp_path)
    study = optuna.create_study(direction="maximize")
    study.optimize(size_of(HBSpace(**TINY)), n_trials=1)
    with pytest.raises(ValueError, match="sample has rule 'hb': must be 'agd'"):
        save_study(study, AGDSpace(**TINY), tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_objectives_have_a_front():
    """Accuracy and size, here by stand-ins: what the guide says of small networks."""
    space = HBSpace(**TINY)

    def objective(trial):
        sample = suggest_sample(trial, space)
        return len({*sample.values()}), space.count(sample, 8).macs

    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.NSGAIISampler(seed=0))
    study.optimize(objective, n_trials=10)
    front = [trial.values for trial in study.best_trials]
    assert not any(a[0] >= b[0] and a[1] <= b[1] and a != b for a in front for b in front)


def test_the_accuracy_of_each_epoch_can_end_a_trial():
    seen = []

    def report(epoch, top1):
        seen.append((epoch, top1))
        raise optuna.TrialPruned

    space, evaluator = HBSpace(**TINY), digits(epochs=2)
    sample = {label: choice.default() for label, choice in space.simplify().items()}
    with pytest.raises(optuna.TrialPruned):
        evaluator.evaluate(space.freeze(sample), report)
    ((epoch, top1),) = seen
    assert epoch == 0
    assert evaluator.evaluate(space.freeze(sample)) >= 0, "the next one is trained"
    assert top1 >= 0


@pytest.mark.slow
def test_two_workers_share_a_study_and_a_killed_one_loses_no_trial(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study(url)
    workers = [processes.Process(target=work, args=(url, 3, killed)) for killed in (1, None)]
    for worker in workers:
        worker.start()
    for worker, status in zip(workers, (-signal.SIGKILL, 0)):
        worker.join(300)
        assert worker.exitcode == status
    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    (lost,) = [trial for trial in trials if trial.state == TrialState.FAIL]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == len(trials) - 1 >= 3
    (repeated,) = [trial for trial in complete if trial.system_attrs.get("failed_trial") == lost.number]
    assert repeated.params == lost.params


@pytest.mark.slow
def test_the_example_works_on_a_study(tmp_path):
    done = run_script("05_optuna.py", "--out", "out", "--limit", "80", "--trials", "2", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"best of 2: [\d.]+ %, out/genotype.json", done.stdout)
    assert len(read_trials(tmp_path / "out")[1]) == 2
    assert (tmp_path / "out" / "study.db").exists()
