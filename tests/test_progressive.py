"""Candidates of single edges, the limit on skip connections, and P-DARTS's stages."""

import json
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from extras import needs

needs("nni", "sklearn")

import search_runs
from nni.nas.strategy import RandomOneShot
from test_nni_search import TINY, checkpoint, differences, processes, without_times
from test_nni_spaces import SMALL, SPACES, choices, export, images, perturb, random_sample, supernet
from test_nni_strategies import experiment

from nni_spaces import DARTS, AGDSpace, HBSpace, HeavyBallInit
from nni_spaces.runs.progressive import PDARTS_STAGES, SearchStage, search_progressively
from nni_spaces.runs.search import SearchModule, make_space, search
from nni_spaces.runs.settings import SearchSettings
from nni_spaces.spaces.derivation import derive, limit_skips, strongest_candidates
from nni_spaces.spaces.edges import SkipDropout
from optinspired_plugins import Genotype
from optinspired_plugins.cells.operations import TABLE_6
from optinspired_plugins.run_folder import read_history


def probabilities_of(net):
    found = {}
    for module in choices(net):
        found.update(module.export_probs(found))
    return found


def edge_alpha(net, label):
    """α of an edge by its label."""
    for module in choices(net):
        if net.rule == "hb" and module.label == label:
            return module._arch_alpha
        if net.rule == "agd" and label in module._arch_alpha:
            return module._arch_alpha[label]
    raise KeyError(label)


# --- a supernet of some candidates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
def test_a_dropped_candidate_is_one_of_weight_zero(kind):
    """The small supernet computes what the full one does at α = −∞, and has no other modules, parameters or α."""
    full = supernet(kind).eval()
    perturb(full)
    allowed = strongest_candidates(probabilities_of(full), 4)
    del allowed["normal/op_2_0" if kind == "hb" else "normal/2_0"]  # has all of them
    small = supernet(kind, allowed=allowed).eval()
    names = list(dict.fromkeys([*full.operations, "none"]))
    with torch.no_grad():
        for label, kept in allowed.items():
            places = [names.index(name) for name in kept]
            edge_alpha(small, label).copy_(edge_alpha(full, label)[places])
            edge_alpha(full, label)[[i for i in range(len(names)) if i not in places]] = -torch.inf
        own = dict(full.named_parameters())
        for name, parameter in small.named_parameters():
            if own[name].shape == parameter.shape:
                parameter.copy_(own[name])
    x = images()
    torch.testing.assert_close(small(x), full(x), rtol=1e-11, atol=1e-11)
    for label, kept in allowed.items():
        assert len(edge_alpha(small, label)) == len(kept) == 4
    sizes = [sum(p.numel() for p in net.parameters()) for net in (small, full)]
    assert sizes[0] < 0.8 * sizes[1]
    assert probabilities_of(small)[label].keys() == set(kept)
    sample = export(small)
    assert sample == export(full) == derive(probabilities_of(full))
    assert small.freeze(sample)(torch.randn(1, 3, 8, 8)).shape == (1, 5)


def test_an_edge_without_its_favourite_has_none():
    """(26) with what is left: only operations that may be chosen begin ahead."""
    init = HeavyBallInit(5.0)
    allowed = {"normal/op_2_1": ["avg_pool_3x3", "sep_conv_3x3"], "normal/op_2_2": ["neg_skip_connect", "none"]}
    net = supernet("hb", initialization=init, allowed=allowed)
    assert edge_alpha(net, "normal/op_2_1").tolist() == [0, 0]
    assert edge_alpha(net, "normal/op_2_2").tolist() == [5, 0]
    assert edge_alpha(net, "normal/op_3_1").tolist().count(5) == 1


def test_samples_of_search_space_hb_are_allowed_ones():
    allowed = {"normal/op_2_0": ["sep_conv_3x3", "skip_connect"], "reduce/op_4_2": ["neg_skip_connect"]}
    space = HBSpace(**SMALL, allowed=allowed)
    seen = set()
    for seed in range(12):
        sample = random_sample(space, seed)
        seen.add(sample["normal/op_2_0"])
        assert sample["reduce/op_4_2"] == "neg_skip_connect"
        assert space.freeze(sample)(torch.randn(1, 3, 8, 8)).shape == (1, 5)
    assert seen == {"sep_conv_3x3", "skip_connect"}
    with pytest.raises(ValueError, match="normal/op_2_0='dil_conv_3x3': must be of sep_conv_3x3, skip_connect"):
        space.freeze({**sample, "normal/op_2_0": "dil_conv_3x3"})
    net = RandomOneShot().mutate_model(space)
    for module in net.modules():
        if hasattr(module, "resample"):
            module.resample({})
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_strategies_without_alpha_cannot_shrink_edges_of_nnis_cell():
    space = AGDSpace(**SMALL, allowed={"normal/2_1": ["sep_conv_3x3"]})
    sample = {**random_sample(space), "normal/input_2_0": [1], "normal/input_2_1": [0]}
    assert space.freeze({**sample, "normal/op_2_0": "sep_conv_3x3"})(torch.randn(1, 3, 8, 8)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"op_2_0='skip_connect': must be of sep_conv_3x3: NNI's .* use DARTS, Gumbel"):
        space.freeze({**sample, "normal/op_2_0": "skip_connect"})
    with pytest.raises(ValueError, match=r"allowed with strategy=RandomOneShot: NNI's cell .*, HBSpace or operations"):
        RandomOneShot().mutate_model(space)


@pytest.mark.parametrize(
    ("kind", "allowed", "message"),
    [
        ("hb", {"normal/2_0": ["skip_connect"]}, "'normal/2_0': must be an edge, 'normal/op_2_0' to 'reduce/op_4_2'"),
        ("agd", {"normal/3_3": ["skip_connect"]}, "has 'normal/3_3': must be an edge, 'normal/2_0' to 'reduce/4_3'"),
        ("darts", {"normal/2_0": ["neg_skip_connect"]}, r"allowed\['normal/2_0'\]=.*: must be distinct of max_pool"),
        ("hb", {"normal/op_2_0": ["none"]}, r"allowed\['normal/op_2_0'\]=\['none'\]: must be .*, one beside 'none'"),
        ("hb", {"normal/op_2_0": []}, r"allowed\['normal/op_2_0'\]=\[\]: must be"),
        ("hb", {"normal/op_2_0": ["skip_connect"] * 2}, "must be distinct"),
    ],
)  # fmt: skip
def test_wrong_candidates_are_named(kind, allowed, message):
    with pytest.raises(ValueError, match=message):
        SPACES[kind](**SMALL, allowed=allowed)


# --- dropout behind skip connections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
def test_dropout_stands_behind_every_skip_connection_and_falls(kind):
    strategy = DARTS()
    net = supernet(kind, strategy, skip_dropout=0.4)
    dropped = {name for name, m in net.named_modules() if isinstance(m, SkipDropout)}
    skips = {name for name, _ in net.named_modules() if name.endswith("skip_connect")}
    assert {name.rpartition(".")[0] for name in dropped} == skips
    assert len(skips) == {"hb": 3 * 9 * 2, "agd": 3 * 9 * 2, "darts": 3 * 9}[kind]
    module = strategy.configure_oneshot_module(SearchModule(0.1, 0.9, 0, 4))
    module.training_module.set_model(net)
    rates = []
    for epoch in range(4):
        module._trainer = SimpleNamespace(current_epoch=epoch, max_epochs=4)
        module.on_train_epoch_start()
        (rate,) = {m.p for m in net.modules() if isinstance(m, SkipDropout)}
        rates.append(rate)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    x = images()
    with torch.no_grad():
        assert not torch.equal(net(x), net(x)), "in training it drops"
        assert torch.equal(net.eval()(x), net(x))
    sample = {key: "skip_connect" if "/op_" in key else value for key, value in export(net).items()}
    assert not any(isinstance(m, torch.nn.Dropout) for m in net.freeze(sample).modules())


def test_wrong_dropout_is_named():
    for wrong in (1, -0.1, True, "0.1"):
        with pytest.raises(ValueError, match=r"skip_dropout=.*: must be (in \[0, 1\)|a finite number)"):
            HBSpace(skip_dropout=wrong)
    with pytest.raises(ValueError, match=r"skip_dropout=0.1 with strategy=DARTS\(order=2\): must be 0, or order 1"):
        DARTS(order=2).mutate_model(AGDSpace(**SMALL, skip_dropout=0.1))


# --- from probabilities to candidates and cells -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
def test_a_cell_is_derived_from_what_a_history_keeps(kind):
    net = supernet(kind)
    perturb(net)
    probabilities = probabilities_of(net)
    assert derive(json.loads(json.dumps(probabilities))) == derive(probabilities) == export(net)


def test_the_strongest_candidates_go_on():
    weights = {"max_pool_3x3": 0.1, "skip_connect": 0.2, "sep_conv_3x3": 0.05, "dil_conv_5x5": 0.2, "none": 0.45}
    probabilities = {"normal/2_1": weights, "normal/beta_2": {"0": 0.5, "1": 0.5}}
    kept = [strongest_candidates(probabilities, keep) for keep in (1, 2, 3, 4, 9)]
    assert [found.keys() for found in kept] == [{"normal/2_1"}] * 5
    assert [found["normal/2_1"] for found in kept] == [
        ["skip_connect"],  # not zero, although it is stronger; of equals, the one that a derivation takes
        ["skip_connect", "none"],
        ["skip_connect", "dil_conv_5x5", "none"],
        ["max_pool_3x3", "skip_connect", "dil_conv_5x5", "none"],
        list(weights),
    ]
    assert derive({"normal/op_2_0": weights}) == {"normal/op_2_0": kept[0]["normal/2_1"][0]}
    with pytest.raises(ValueError, match="keep=0: must be an integer ≥ 1"):
        strongest_candidates(probabilities, 0)


def heavy_ball_probabilities(normal):
    """Equal probabilities but for the named edges of the normal cell."""
    rest = {"sep_conv_3x3": 0.2, "none": 0.8}
    labels = [f"{cell}/op_{t}_{k}" for cell in ("normal", "reduce") for t in (2, 3, 4, 5) for k in range(3)]
    return {label: dict(normal.get(label, rest)) for label in labels}


def test_the_weakest_skips_of_the_normal_cell_give_way():
    edges = {
        "normal/op_2_0": {"skip_connect": 0.5, "dil_conv_3x3": 0.3},
        "normal/op_3_0": {"skip_connect": 0.4, "neg_skip_connect": 0.35, "max_pool_3x3": 0.2},
        "normal/op_4_0": {"neg_skip_connect": 0.6, "avg_pool_3x3": 0.4},
        "normal/op_5_0": {"neg_skip_connect": 0.3, "none": 0.7},  # has nothing else
    }
    probabilities = heavy_ball_probabilities(edges)
    probabilities["reduce/op_2_0"] = dict(edges["normal/op_2_0"])
    before = json.dumps(probabilities)

    def cell(most):
        return {key: value for key, value in derive(limit_skips(probabilities, most)).items() if key in edges}

    assert list(cell(4).values()) == ["skip_connect", "skip_connect", "neg_skip_connect", "neg_skip_connect"]
    assert list(cell(3).values()) == ["skip_connect", "max_pool_3x3", "neg_skip_connect", "neg_skip_connect"]
    assert list(cell(2).values()) == ["dil_conv_3x3", "max_pool_3x3", "neg_skip_connect", "neg_skip_connect"]
    assert list(cell(1).values()) == ["dil_conv_3x3", "max_pool_3x3", "avg_pool_3x3", "neg_skip_connect"]
    assert cell(0) == cell(1)
    assert derive(limit_skips(probabilities, 0))["reduce/op_2_0"] == "skip_connect"
    assert json.dumps(probabilities) == before
    with pytest.raises(ValueError, match="max_skips=-1: must be an integer ≥ 0"):
        limit_skips(probabilities, -1)


@pytest.mark.parametrize("most", [0, 1, 2])
@pytest.mark.parametrize("favourite", ["skip_connect", "neg_skip_connect", "sep_conv_3x3"])
def test_the_heavy_ball_rule_is_no_collapse(favourite, most):
    """Its start has eight ± identities of weight 0.949; only those that F has learned beside them give way."""
    net = supernet("hb", nodes=4, initialization=HeavyBallInit())
    with torch.no_grad():
        for t in range(2, 6):
            alpha = edge_alpha(net, f"normal/op_{t}_0")
            alpha[net.operations.index(favourite)] = 1 + 0.1 * t
    probabilities = probabilities_of(net)
    plain, limited = derive(probabilities), derive(limit_skips(probabilities, most))
    skips = 0
    for t in range(2, 6):
        assert plain[f"normal/op_{t}_0"] == favourite
        assert limited[f"normal/op_{t}_1"] == plain[f"normal/op_{t}_1"] == "skip_connect"
        assert limited[f"normal/op_{t}_2"] == plain[f"normal/op_{t}_2"] == "neg_skip_connect"
        skips += "skip_connect" in limited[f"normal/op_{t}_0"]
    assert skips == (most if "skip_connect" in favourite else 0)
    assert [limited[f"normal/op_{t}_0"] == favourite for t in range(6 - most, 6)] == [True] * most, "the strongest stay"


def test_a_skip_that_gives_way_may_take_its_edge_along():
    """Node 3 has three sources of which two are kept, by p · softmax(α)."""
    probabilities = {
        "normal/3_0": {"skip_connect": 0.9, "sep_conv_3x3": 0.1},
        "normal/3_1": {"sep_conv_3x3": 0.5},
        "normal/3_2": {"skip_connect": 0.6, "dil_conv_3x3": 0.4},
        "normal/beta_3": {"0": 0.5, "1": 0.3, "2": 0.2},
    }
    assert derive(probabilities) == {
        "normal/op_3_0": "skip_connect", "normal/input_3_0": [0],
        "normal/op_3_1": "sep_conv_3x3", "normal/input_3_1": [1],
    }  # fmt: skip
    assert derive(limit_skips(probabilities, 0)) == {
        "normal/op_3_0": "sep_conv_3x3", "normal/input_3_0": [1],
        "normal/op_3_1": "dil_conv_3x3", "normal/input_3_1": [2],
    }  # fmt: skip


# --- stages -----------------------------------------------------------------------------------------------------------

STAGES = [(3,), (4, 5, 0.4), (5, 3, 0.7)]
PROGRESSIVE = {**TINY, "epochs": 2, "strategy": "p-darts"}
RUNS = {
    "hb": dict(space="hb", initialization="heavy-ball"),
    "agd": dict(space="agd", partial_channels=2, warmup_epochs=1),
}


def run(folder, kind, **kwargs):
    settings = {**PROGRESSIVE, **RUNS[kind]}
    process = processes.Process(target=search_runs.run_in_stages, args=(folder, settings, STAGES), kwargs=kwargs)
    process.start()
    process.join(300)
    return process.exitcode


def assert_same_run(folder, reference):
    for stage in ("stage1", "stage2", "stage3"):
        assert differences(checkpoint(folder / stage), checkpoint(reference / stage)) == []
        marks = [[{**entry, "resumed": None} for entry in without_times(f / stage)] for f in (folder, reference)]
        assert marks[0] == marks[1]
    assert (folder / "genotype.json").read_bytes() == (reference / "genotype.json").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(once):
    def search(kind, folder):
        assert run(folder, kind) == 0

    return {kind: once(f"stages_{kind}", partial(search, kind)) for kind in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_stages_hand_on_their_strongest_candidates(kind, uninterrupted):
    folder = uninterrupted[kind]
    histories = [read_history(folder / f"stage{n}") for n in (1, 2, 3)]
    settings = [json.loads((folder / f"stage{n}" / "settings.json").read_text()) for n in (1, 2, 3)]
    assert [(s["cells"], s["skip_dropout"], s["strategy"]) for s in settings] == [
        (3, 0, "darts"), (4, 0.4, "darts"), (5, 0.7, "darts")
    ]  # fmt: skip
    assert settings[0]["allowed"] is None
    for before, after, keep in ((0, 1, 5), (1, 2, 3)):
        last = histories[before][-1]["probabilities"]
        assert settings[after]["allowed"] == strongest_candidates(last, keep)
        for label, names in settings[after]["allowed"].items():
            assert list(histories[after][0]["probabilities"][label]) == names
            assert len(names) == keep
    genotype = Genotype.load(folder / "genotype.json")
    assert genotype == Genotype.from_nni(derive(limit_skips(histories[2][-1]["probabilities"], 2)))
    limited = [edge for node in genotype.normal for edge in (node[:1] if kind == "hb" else node)]
    assert sum("skip_connect" in edge.operation for edge in limited) <= 2


@pytest.mark.slow
def test_alpha_stands_still_in_the_first_epochs(uninterrupted):
    first, second = read_history(uninterrupted["agd"] / "stage1")
    flat = {round(p, 4) for name, row in first["probabilities"].items() if "beta" not in name for p in row.values()}
    assert flat == {0.1111}
    assert first["alpha_loss"] is None
    assert first["train_loss"] > 0
    assert second["alpha_loss"] > 0
    assert second["probabilities"] != first["probabilities"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(uninterrupted, tmp_path):
    assert run(tmp_path, "agd") == 0
    assert_same_run(tmp_path, uninterrupted["agd"])


@pytest.mark.slow
def test_killed_inside_and_between_stages_it_is_the_uninterrupted_run(uninterrupted, tmp_path):
    """In the second of three stages (2 batches an epoch, 4 a stage), before the third, and before the genotype."""
    for kill in (dict(kill_at=6), dict(kill_before="stage3/settings.json"), dict(kill_before="genotype.json")):
        assert run(tmp_path, "hb", **kill) == -signal.SIGKILL
        assert not (tmp_path / "genotype.json").exists()
    assert run(tmp_path, "hb") == 0
    assert_same_run(tmp_path, uninterrupted["hb"])


@pytest.mark.slow
def test_a_shrink_by_hand_with_nnis_experiment(tmp_path, monkeypatch):
    options = dict(channels=2, nodes=2, in_chans=1)
    first = DARTS()
    experiment(AGDSpace(cells=3, **options), first, tmp_path / "1", monkeypatch)
    probabilities = first.oneshot_module.export_probs()
    allowed = strongest_candidates(probabilities, 3)
    second = DARTS()
    space = AGDSpace(cells=4, **options, allowed=allowed, skip_dropout=0.4)
    (sample,) = experiment(space, second, tmp_path / "2", monkeypatch)
    probabilities = second.oneshot_module.export_probs()
    assert {name for row in probabilities.values() for name in row} <= {*TABLE_6, 0, 1, 2}
    assert {label: list(row) for label, row in probabilities.items() if label in allowed} == allowed
    assert sample == derive(probabilities)
    limited = space.genotype(derive(limit_skips(probabilities, 1)))
    assert sum("skip_connect" in edge.operation for node in limited.normal for edge in node) <= 1


def test_the_published_stages():
    assert [(stage.cells, stage.keep, stage.skip_dropout) for stage in PDARTS_STAGES] == [
        (5, None, 0.0), (11, 5, 0.4), (17, 3, 0.7)
    ]  # fmt: skip
    space = make_space(SearchSettings(space="darts"), 10, 3)
    net = DARTS().mutate_model(space)
    assert {len(row) for row in probabilities_of(net).values()} == {8}, "the first stage has all eight"


def test_wrong_stages_are_named(tmp_path):
    for wrong, message in (
        (dict(cells=2), "cells=2: must be an integer ≥ 3"),
        (dict(cells=5, keep=0), "keep=0: must be an integer ≥ 1"),
        (dict(cells=5, skip_dropout=1.0), r"skip_dropout=1.0: must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            SearchStage(**wrong)
    settings = SearchSettings(**TINY)
    for stages in ([], [SearchStage(5, 3)]):
        with pytest.raises(ValueError, match=r"stages=.*: must have at least one, and keep of the first must be None"):
            search_progressively(settings, tmp_path, stages=stages)
    with pytest.raises(ValueError, match="max_skips=-1: must be an integer ≥ 0"):
        search_progressively(settings, tmp_path, max_skips=-1)
    with pytest.raises(ValueError, match=r"strategy='p-darts': is a search in stages, use .*search_progressively"):
        search(SearchSettings(**PROGRESSIVE), tmp_path)
