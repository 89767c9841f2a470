"""Searches in the space of any algorithm, from the search to the report, and what a file of its genotype may hold."""

import json
import multiprocessing
import random
import signal
import sys

import pytest
import timm
import torch
from extras import needs

needs("nni", "sklearn")

import search_runs
from nni.nas.strategy import Random
from test_nni_search import assert_same_search
from trial_runs import sized

from nni_spaces import AlgorithmInit, AlgorithmSpace, read_trials, run_trials
from nni_spaces.runs.progressive import SearchStage, search_progressively
from nni_spaces.runs.retrain import retrain
from nni_spaces.runs.search import make_space, search
from nni_spaces.runs.settings import RetrainSettings, SearchSettings
from optinspired_plugins.cells.genotype import CHOICES, GENOTYPES, Edge, Genotype, load_genotype
from optinspired_plugins.plotting.cells import draw_cells
from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS
from optinspired_plugins.report.page import write_report
from optinspired_plugins.report.trials import parameters_of

TINY = dict(
    data="digits", limit=64, epochs=1, channels=2, cells=3, nodes=2, batch_size=16, padding=0, lr=0.1, alpha_lr=0.1,
    initialization="algorithm",
)  # fmt: skip
SMALL = dict(data="digits", limit=64, epochs=1, cells=3, channels=2, batch_size=32, aux_weight=0, cutout=0, padding=0)
ALGORITHMS = {
    **{name: dict(algorithm=name) for name in NETWORK_ALGORITHMS},
    "own": dict(algorithm="my_algorithms:OptimizedGradient", edge_weights=True),
    "merged": dict(algorithm="agd2", merge=True, keep=1, edge_weights=True),
}

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["search_runs", "nni_spaces.runs.search", "sklearn.datasets"])


def run(folder, settings, **kwargs):
    process = processes.Process(target=search_runs.run, args=(folder, settings), kwargs=kwargs)
    process.start()
    process.join(300)
    return process.exitcode


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_searched_trained_and_reported(name, tmp_path):
    settings = SearchSettings(**{**TINY, **ALGORITHMS[name]})
    genotype = search(settings, tmp_path, accelerator="cpu")
    assert load_genotype(tmp_path / "genotype.json") == genotype
    assert genotype.version == (1 if name == "hb" else 2)
    assert json.loads((tmp_path / "settings.json").read_text())["space"] == "algorithm"
    space = make_space(settings, 10, 1)
    if not space.chooses_sources:
        assert tuple(tuple(edge.source for edge in node) for node in genotype.normal) == space.sources
    top1 = retrain(RetrainSettings(genotype=genotype.to_dict(), **SMALL), tmp_path / "retrain", accelerator="cpu")
    assert 0 <= top1 <= 100
    page = write_report(tmp_path).read_text(encoding="utf-8")
    data = json.loads(page.split('type="application/json" id="data">')[1].split("</script>")[0])
    edges = [edge["name"] for edge in data["edges"] if edge["cell"] == "normal"]
    assert len(edges) == len(set(edges)) == len(space.edges) // 2
    assert data["chosen"][-1][0] or space.chooses_sources
    assert len(draw_cells(genotype).axes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(algorithm="admm", edge_weights=True), dict(algorithm="ogm", merge=True)])
def test_killed_and_resumed_it_is_the_uninterrupted_search(settings, tmp_path):
    settings = {**TINY, **settings, "epochs": 2}
    assert run(tmp_path / "a", settings) == 0
    assert run(tmp_path / "b", settings, kill_at=3) == -signal.SIGKILL
    assert run(tmp_path / "b", settings) == 0
    assert_same_search(tmp_path / "b", tmp_path / "a")


def test_partial_channels_and_stages_take_an_algorithm(tmp_path):
    settings = SearchSettings(**{**TINY, "algorithm": "ogm", "strategy": "pc-darts", "partial_channels": 2})
    assert search(settings, tmp_path / "pc", accelerator="cpu").rule == "ogm"
    stages = [SearchStage(3), SearchStage(3, 3, 0.2)]
    for name in ("ogm", "merged"):
        settings = SearchSettings(**{**TINY, **ALGORITHMS.get(name, dict(algorithm=name)), "strategy": "p-darts"})
        options = dict(stages=stages, max_skips=0, accelerator="cpu")
        genotype = search_progressively(settings, tmp_path / name, **options)
        assert genotype == load_genotype(tmp_path / name / "genotype.json")
        assert "skip_connect" not in {edge.operation for node in genotype.normal for edge in node}
        assert write_report(tmp_path / name).stat().st_size > 10_000


def test_trials_take_an_algorithm(tmp_path):
    options = dict(channels=2, cells=3, nodes=2, num_classes=5)
    strategy = lambda: Random(dedup=False, seed=0)  # noqa: E731
    done = run_trials(AlgorithmSpace("admm", **options), strategy(), sized(), tmp_path, 2)
    assert {trial.genotype.rule for trial in done} == {"admm"}
    settings, trials = read_trials(tmp_path)
    assert settings["rule"] == "admm"
    assert settings["edges"] == [[0, 1, 0], [1, 2, 1, 0]]
    for trial in trials:  # their results are the numbers of parameters
        assert parameters_of(trial.genotype, settings) == trial.metric
    assert run_trials(AlgorithmSpace("admm", **options), strategy(), sized(), tmp_path, 3)[0].genotype
    assert read_trials(tmp_path)[1][:2] == trials
    with pytest.raises(ValueError, match="holds trials with"):
        run_trials(AlgorithmSpace("ogm", **options), strategy(), sized(), tmp_path, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(merge=True), "merge=True: needs algorithm"),
        (dict(keep=2), "keep=2: needs algorithm"),
        (dict(edge_weights=True), "edge_weights=True: needs algorithm"),
        (dict(space="algorithm"), "space='algorithm': needs algorithm, a name or module:attribute"),
        (dict(space="agd", algorithm="ogm"), "space='agd' with algorithm='ogm': must be left out"),
    ],
)
def test_options_of_an_algorithm_need_one(change, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**change)


def test_an_unknown_algorithm_is_named_before_a_file_is_written(tmp_path):
    settings = SearchSettings(**{**TINY, "algorithm": "newton"})
    with pytest.raises(ValueError, match="algorithm='newton': must be one of gd, hb"):
        search(settings, tmp_path, accelerator="cpu")
    assert not (tmp_path / "settings.json").exists()
    with pytest.raises(ValueError, match="initialization=HeavyBallInit: needs HBSpace"):
        make_space(SearchSettings(**{**TINY, "algorithm": "ogm", "initialization": "heavy-ball"}), 10, 1)
    start = make_space(SearchSettings(**{**TINY, "algorithm": "ogm", "edge_weights": True}), 10, 1).initialization
    assert start == AlgorithmInit(edge_weights=True)
    assert start != AlgorithmInit()


# --- files of version 2 -----------------------------------------------------------------------------------------------


def of_pattern(draw):
    """A genotype of a rule that the package does not have."""
    cells = [
        [[Edge(draw.choice(CHOICES), draw.randrange(t)) for _ in range(draw.randint(1, 4))] for t in range(2, 5)]
        for _ in range(2)
    ]
    for cell in cells:
        cell[0][0] = cell[0][0]._replace(source=1)  # a network of cells that skip their last input has unused cells
    return Genotype("my.rule:Mine-2", *cells)


@pytest.mark.parametrize("seed", range(5))
def test_a_cell_of_any_rule_is_a_file_and_a_network(seed, tmp_path):
    genotype = of_pattern(random.Random(seed))
    genotype.save(tmp_path / "g.json")
    assert load_genotype(tmp_path / "g.json") == genotype == Genotype.from_dict(genotype.to_dict())
    assert json.loads((tmp_path / "g.json").read_text())["version"] == 2
    net = timm.create_model("cellnet_cifar", genotype=tmp_path / "g.json", cells=3, channels=4, num_classes=5)
    scripted = torch.jit.script(net.eval())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(scripted(x), net(x))
    cell, s0, s1 = net.cells[0], torch.randn(2, 12, 8, 8), torch.randn(2, 12, 8, 8)
    states, ops = [cell.preprocess0(s0), cell.preprocess1(s1)], iter(cell.ops)
    for node in genotype.normal:
        states.append(sum(next(ops)(states[edge.source]) for edge in node))
    torch.testing.assert_close(cell(s0, s1), torch.cat(states[2:], 1))
    net.train()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_files_of_the_papers_rules_stay_of_version_1():
    for name, genotype in GENOTYPES.items():
        data = genotype.to_dict()
        assert (data["version"], genotype.version) == (1, 1), name
        assert Genotype.from_dict({**data, "version": 2}) == genotype
    with pytest.raises(ValueError, match="rule='ogm': must be one of 'hb', 'agd' in version 1"):
        Genotype.from_dict({**data, "rule": "ogm"})
    with pytest.raises(ValueError, match=r"normal\[0\]=.*: must be a list of 3 edges, as rule='hb' has"):
        Genotype.from_dict({**data, "rule": "hb", "version": 2})


VALUES = [
    None, True, -1, 0, 2, 10**30, 1.0, float("nan"), "", "none", "skip_connect", "os:system", "json:dumps",
    "__import__('os').system('touch hacked')", "../../etc/passwd", "\u202e", "\x00", "a" * 5000, [], {}, [[]],
    {"version": 2}, [["skip_connect", 0]],
]  # fmt: skip
FIELDS = ("version", "rule", "normal", "reduction", "genotype")


def mutated(data, draw):
    """Change one to three places of a nest of lists and dicts."""
    data = json.loads(json.dumps(data))
    for _ in range(draw.randint(1, 3)):
        place = data
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(place[key], (dict, list)) and draw.random() < 0.7:
                place = place[key]
                continue
            action = draw.randrange(4)
            if action == 0:
                del place[key]
            elif action == 1 and isinstance(place, list):
                place.insert(key, draw.choice([*VALUES, place[key]]))
            elif action == 2 and isinstance(place, dict):
                place[draw.choice(["x", "rule ", "__class__", "\n"])] = draw.choice(VALUES)
            else:
                place[key] = draw.choice(VALUES)
            break
    return data


EVENTS = {"exec", "compile", "import", "open", "os.system", "subprocess.Popen", "pickle.find_class"}


@pytest.fixture
def events():
    """What this process compiles, runs, imports and opens."""
    seen, active = [], [True]
    sys.addaudithook(lambda event, args: seen.append((event, args)) if active and event in EVENTS else None)
    yield seen
    active.clear()  # a hook cannot be removed


def test_a_damaged_file_of_version_2_is_an_error_that_names_a_field(events):
    """5,000 mutations: no code runs, and every error is a line that names a field."""
    Genotype.from_json(of_pattern(random.Random(0)).to_json())
    events.clear()
    draw, refused = random.Random(0), 0
    for _ in range(5_000):
        data = mutated(of_pattern(draw).to_dict(), draw)
        try:
            genotype = Genotype.from_json(json.dumps(data))
        except ValueError as error:
            message, refused = str(error), refused + 1
            assert message.isprintable()
            assert len(message) < 500
            assert message.startswith(FIELDS), message
        else:
            assert genotype.to_dict().keys() == data.keys()
            assert Genotype.from_json(genotype.to_json()) == genotype
    assert 3_000 < refused < 5_000
    assert events == []
    compile("1", "", "eval")
    assert [event for event, _ in events] == ["compile"], "the hook sees code"
