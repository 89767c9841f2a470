"""The space of any algorithm: the paper's spaces are two of them, and all are built, sampled and derived alike."""

import random
from itertools import product

import pytest
import timm
import torch
from extras import needs

needs("nni")

from my_algorithms import LearnedHeavyBall
from my_algorithms import OptimizedGradient as OwnGradientMethod
from nni.nas.strategy import Proxyless, RandomOneShot

from nni_spaces import (
    DARTS,
    AGDSpace,
    AlgorithmInit,
    AlgorithmSpace,
    DARTSSpace,
    HBSpace,
    HeavyBallInit,
    RandomInit,
    ZeroInit,
    derive,
    limit_skips,
)
from nni_spaces.spaces.edges import WeightedLayer
from optinspired_plugins import HeavyBall
from optinspired_plugins.cells.genotype import CHOICES, Genotype
from optinspired_plugins.cells.operations import DARTS_OPERATIONS
from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS
from optinspired_plugins.propagation.patterns import pattern

NODES = 2
SMALL = dict(channels=4, cells=3, nodes=NODES, num_classes=5)
AGD = dict(merge=True, keep=2, edge_weights=True)


def supernet(make, strategy=DARTS):
    torch.manual_seed(0)
    return strategy().mutate_model(make())


def layers_of(net):
    return [m for m in net.modules() if hasattr(m, "arch_parameters") and hasattr(m, "export_probs")]


def exported(net):
    sample, probabilities = {}, {}
    for module in layers_of(net):
        sample.update(module.export(sample))
        probabilities.update(module.export_probs(probabilities))
    return sample, probabilities


def random_sample(space, seed=0):
    draw = random.Random(seed)
    return {
        label: [draw.choice(list(m.values))] if hasattr(m, "n_chosen") else draw.choice(list(m.values))
        for label, m in space.simplify().items()
    }


# --- the paper's spaces -----------------------------------------------------------------------------------------------

TWINS = {
    "hb": (HBSpace, dict(algorithm="hb", initialization=RandomInit())),
    "hb, object": (HBSpace, dict(algorithm=HeavyBall(0.3), initialization=RandomInit())),
    "agd": (AGDSpace, dict(algorithm="agd2", initialization=RandomInit(), **AGD)),
    "darts": (
        DARTSSpace,
        dict(algorithm="agd2", initialization=RandomInit(), merge=True, keep=2, operations=DARTS_OPERATIONS),
    ),
}
OPTIONS = [
    {},
    dict(partial_channels=2, skip_dropout=0.2),
    dict(nodes=3, initialization=ZeroInit(), grad_checkpointing=True),
]


@pytest.mark.parametrize(
    ("name", "options"), [*product(("hb", "agd", "darts"), OPTIONS), ("hb, object", {})], ids=lambda value: str(value)
)
def test_the_papers_spaces_are_spaces_of_algorithms_to_the_bit(name, options):
    """Labels, parameters, outputs and gradients of supernet and samples, exports and genotypes."""
    space, arguments = TWINS[name]
    found = []
    for make in (
        lambda: space(**{**SMALL, **options}),
        lambda: AlgorithmSpace(**{**arguments, **SMALL, **options}),
    ):
        torch.manual_seed(0)
        plain = make()
        sample = random_sample(plain)
        net = supernet(make)
        y = net(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
        y.square().sum().backward()
        gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        derived, probabilities = exported(net)
        torch.manual_seed(2)
        frozen = plain.freeze(sample)
        states = {**plain.state_dict(), **{f"net.{n}": v for n, v in net.state_dict().items()}, "y": y.detach()}
        states |= {f"grad.{n}": g for n, g in gradients.items()} | {f"f.{n}": v for n, v in frozen.state_dict().items()}
        texts = [repr(plain.simplify()), sample, plain.genotype(sample), net.genotype(derived), probabilities]
        found.append((states, texts, plain.rule))
    (states, texts, rule), (others, other_texts, other_rule) = found
    assert texts == other_texts
    assert rule == other_rule
    assert list(states) == list(others)
    assert all(torch.equal(states[key], others[key]) for key in states)
    assert len([key for key in states if key.startswith("grad.")]) > 50


def test_the_papers_spaces_are_algorithm_spaces():
    for space in (HBSpace, AGDSpace, DARTSSpace):
        assert isinstance(space(**SMALL), AlgorithmSpace)
    assert HBSpace(4, 3, 2, 5).sizes == dict(channels=4, cells=3, nodes=2, num_classes=5, in_chans=3)


@pytest.mark.parametrize("logit", [5.0, 40.0])
def test_the_heavy_balls_start_is_its_algorithms(logit):
    nets = [
        supernet(lambda: HBSpace(**SMALL, initialization=HeavyBallInit(logit))),
        supernet(lambda: HBSpace(**SMALL, initialization=AlgorithmInit(logit))),
        supernet(lambda: AlgorithmSpace("hb", **SMALL, initialization=HeavyBallInit(logit))),
    ]
    first, *others = [net.state_dict() for net in nets]
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    for slot in range(3):
        torch.manual_seed(0)
        mine = AlgorithmInit(logit).alpha("hb", slot, CHOICES)
        torch.manual_seed(0)
        assert torch.equal(mine, HeavyBallInit(logit).alpha("hb", slot, CHOICES))
    assert repr(HeavyBallInit(logit)) == f"HeavyBallInit(logit={logit}, std=0.001)"


# --- every algorithm --------------------------------------------------------------------------------------------------


def plain_cell(cell, edges, s0, s1):
    """Σ_e p_e Σ_o softmax(α_e)_o o(x_s), zero being the last."""
    x = cell.preprocessors([s0, s1])
    for node, sources in zip(cell.nodes, edges.sources):
        total = 0
        for k, (edge, source) in enumerate(zip(node, sources)):
            w = edge._arch_alpha.softmax(-1)
            p = edge._arch_beta.softmax(-1)[k] if hasattr(edge, "_arch_beta") else 1
            total = total + p * sum(w[o] * edge[name](x[source]) for o, name in enumerate(edge.names))
        x.append(total)
    return torch.cat(x[2:], 1)


@pytest.mark.parametrize(
    ("name", "edge_weights"), [*((name, True) for name in NETWORK_ALGORITHMS), ("hb", False), ("admm", False)]
)
def test_a_supernets_cell_has_the_edges_of_its_algorithm(name, edge_weights):
    net = supernet(lambda: AlgorithmSpace(name, **SMALL, edge_weights=edge_weights)).double()
    with torch.no_grad():
        for module in layers_of(net):
            for parameter in module.arch_parameters():
                parameter.copy_(torch.randn_like(parameter))
    cell = net.cells[1]
    s0 = torch.randn(2, 12, 8, 8, dtype=torch.float64, requires_grad=True)
    s1 = torch.randn(2, 4 * NODES, 8, 8, dtype=torch.float64, requires_grad=True)
    got, expected = cell([s0, s1]), plain_cell(cell, pattern(NETWORK_ALGORITHMS[name](), NODES), s0, s1)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(got)
    every = list({id(p): p for m in layers_of(cell) for p in m.arch_parameters()}.values())
    assert len(every) == sum(map(len, cell.sources)) + NODES * edge_weights
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), every) for y in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{}, dict(edge_weights=True)], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", NETWORK_ALGORITHMS)
def test_a_search_starts_at_its_algorithm(name, options):
    """Layers are open, linear edges are ± identity, and p is |weight| / Σ |weight|."""
    init = AlgorithmInit(8.0, edge_weights=True)
    net = supernet(lambda: AlgorithmSpace(name, **SMALL, **options, initialization=init))
    for node, edges in zip(net.cells[0].nodes, pattern(NETWORK_ALGORITHMS[name](), NODES).nodes):
        total = sum(abs(edge.weight) for edge in edges)
        for layer, edge in zip(node, edges):
            w = dict(zip([*layer.names, "none"], layer.weights().tolist()))
            favoured = "skip_connect" if edge.weight > 0 else "neg_skip_connect"
            expected = 1 / 9 if edge.kind == "op" else init.weight()
            assert w[favoured] == pytest.approx(expected, abs=1e-3)
            assert isinstance(layer, WeightedLayer) == bool(options)
            if options:
                assert layer.edge_weight().item() == pytest.approx(abs(edge.weight) / total, rel=1e-5)


def test_merged_edges_start_open_with_the_weights_of_the_algorithm():
    init = AlgorithmInit(edge_weights=True)
    net = supernet(lambda: AlgorithmSpace("agd2", **SMALL, **AGD, initialization=init))
    edges = pattern(NETWORK_ALGORITHMS["agd2"](), NODES).merged().nodes[1]
    p = net.cells[0].edge_weights(3)
    assert p.tolist() == pytest.approx([edge.weight / sum(e.weight for e in edges) for edge in edges], rel=1e-5)
    alphas = [alpha for module in layers_of(net) for alpha in module._arch_alpha.values()]
    assert all(alpha.abs().max() < 0.01 for alpha in alphas)


CASES = {
    **{name: dict(algorithm=name) for name in NETWORK_ALGORITHMS},
    "own": dict(algorithm=OwnGradientMethod()),
    "learned": dict(algorithm=LearnedHeavyBall),
    "merged": dict(algorithm="ogm", merge=True),
    "one of each": dict(algorithm="agd2", merge=True, keep=1),
    "keeps all": dict(algorithm="halpern", merge=True, keep=2),
}
RULES = {
    "agd": "nesterov", "own": "OptimizedGradient", "learned": "LearnedHeavyBall", "merged": "ogm-merged",
    "one of each": "agd2-merged-1", "keeps all": "halpern-merged-2",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_sample_is_a_network_a_file_and_a_timm_model(case, tmp_path):
    space = AlgorithmSpace(**CASES[case], **SMALL)
    sample = random_sample(space)
    genotype = space.genotype(sample)
    assert genotype.rule == RULES.get(case, case)
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert genotype.to_nni(space.chooses_sources) == sample
    genotype.save(tmp_path / "g.json")
    model = timm.create_model("cellnet_cifar", genotype=tmp_path / "g.json", cells=3, channels=4, num_classes=5).eval()
    frozen = space.freeze(sample).eval()
    values = iter(model.state_dict().values())
    frozen.load_state_dict({name: next(values) for name in frozen.state_dict()})
    assert next(values, None) is None
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(frozen(x), model(x))


@pytest.mark.parametrize("case", CASES)
def test_what_a_search_derives_is_of_its_space(case):
    net = supernet(lambda: AlgorithmSpace(**CASES[case], **SMALL))
    sample, probabilities = exported(net)
    genotype = net.genotype(sample)
    if not net.chooses_sources:
        assert tuple(tuple(edge.source for edge in node) for node in genotype.normal) == net.sources
        assert derive(probabilities) == sample
        for edge, choice in zip(net.edges.values(), sample.values()):
            if edge.kind == "lin":
                assert choice == ("skip_connect" if edge.weight > 0 else "neg_skip_connect")
    else:
        assert {len(node) for node in genotype.normal} == {net.structure.keep}
    net.freeze(sample)
    assert all(p.grad is not None for p in _trained(net))


def _trained(net):
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    return [p for p in net.parameters() if p.requires_grad]


def test_skips_of_layers_are_limited_and_the_algorithm_stays():
    net = supernet(lambda: AlgorithmSpace("ogm", **SMALL))
    _, probabilities = exported(net)
    for label, row in probabilities.items():
        if net.edges[label].kind == "op":
            row.update(dict.fromkeys(row, 0.1), skip_connect=0.9)
    limited = limit_skips(probabilities, 0, layers=net.structure.operation_labels(NODES))
    genotype = net.genotype(derive(limited))
    for node in genotype.normal:
        assert [edge.operation for edge in node][2] == "neg_skip_connect"
        assert not {"skip_connect", "neg_skip_connect"} & {edge.operation for edge in node[:2]}
    assert {edge.operation for node in genotype.reduction for edge in node[:2]} == {"skip_connect"}


@pytest.mark.parametrize("strategy", [Proxyless, RandomOneShot])
def test_other_strategies_take_fixed_edges(strategy):
    net = supernet(lambda: AlgorithmSpace("admm", **SMALL), strategy)
    sample = {}
    for module in net.modules():
        if hasattr(module, "resample"):
            sample.update(module.resample(sample))
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    if strategy is Proxyless:
        alphas = [edge._arch_alpha for node in net.cells[0].nodes for edge in node]
        assert sorted(alpha.max().item() for alpha in alphas)[-1] == pytest.approx(5.0)


# --- what does not go -------------------------------------------------------------------------------------------------


class Quadratic:
    """An algorithm that is not linear."""

    def init(self, x0):
        return x0

    def step(self, state, grad):
        return state - state * grad(state)

    def result(self, state):
        return state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(algorithm=Quadratic()), "the algorithm multiplies an iterate by a _Symbol, not by a number"),
        (dict(algorithm="newton"), "algorithm='newton': must be one of gd, hb, agd"),
        (dict(algorithm="hb", nodes=1), "nodes=1: must be an integer ≥ 2"),
        (dict(algorithm="admm", merge=True), "merge=True with 2 paths: must be False"),
        (dict(algorithm="hb", keep=2), "keep=2 with merge=False: must be None"),
        (dict(algorithm="agd2", merge=True, keep=0), "keep=0: must be an integer ≥ 1"),
        (dict(algorithm="agd2", merge=True, keep=3, nodes=3), "keep=3: must be None, 1 or 2, node 2 has two sources"),
        (dict(algorithm="ogm", merge=True, keep=1), "keep=1: must be None or ≥ 2, a node of ogm-merged-1 has 2"),
        (dict(algorithm="gd", initialization=HeavyBallInit()), "initialization=HeavyBallInit: needs HBSpace"),
        (dict(algorithm="ogm", operations=["sep_conv_3x3"]), "must hold 'neg_skip_connect' for AlgorithmInit"),
    ],
)
def test_what_is_no_space_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmSpace(**{**SMALL, **arguments})


def test_an_object_without_the_methods_is_named():
    with pytest.raises(TypeError, match="has no method init"):
        AlgorithmSpace(3, **SMALL)
    with pytest.raises(ValueError, match="needs HBSpace or an AlgorithmSpace"):
        AlgorithmInit().alpha("ogm", 0, CHOICES)


def test_a_sample_of_another_pattern_is_refused():
    ogm, agd2 = AlgorithmSpace("ogm", **SMALL), AlgorithmSpace("agd2", **SMALL)
    with pytest.raises(ValueError, match=r"sample has no 'normal/op_2_3'"):
        agd2.genotype(random_sample(ogm))
    with pytest.raises(ValueError, match=r"sample has 'normal/op_2_3': not an edge of 2 nodes"):
        ogm.genotype(random_sample(agd2))
