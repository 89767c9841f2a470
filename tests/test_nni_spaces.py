"""Spaces, mixed layers and initialisations: the equations of section 9, the sizes of design, what may be exported."""

import random

import numpy as np
import pytest
import timm
import torch
from extras import needs
from torch import nn

needs("nni")

from equality import randomise
from nni.nas.hub.pytorch import DARTS as HubDARTS
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import GumbelDARTS as StockGumbelDARTS
from nni.nas.strategy import Proxyless, RandomOneShot

from nni_spaces import (
    DARTS,
    AGDSpace,
    DARTSSpace,
    GumbelDARTS,
    HBSpace,
    HeavyBallInit,
    MixedCell,
    MixedLayer,
    RandomInit,
    ZeroInit,
)
from optinspired_plugins import GENOTYPES
from optinspired_plugins.cells.operations import TABLE_6

SPACES = {"hb": HBSpace, "agd": AGDSpace, "darts": DARTSSpace}
SMALL = dict(channels=4, cells=3, nodes=3, num_classes=5)


def supernet(kind, strategy=None, **kwargs):
    torch.manual_seed(0)
    net = (strategy or DARTS()).mutate_model(SPACES[kind](**{**SMALL, **kwargs}))
    return net.double()


def images(size=8):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def choices(net):
    return [m for m in net.modules() if isinstance(m, (MixedLayer, MixedCell))]


def architecture(net):
    return {id(p): p for m in choices(net) for p in m.arch_parameters()}


def export(net):
    sample = {}
    for module in choices(net):
        sample.update(module.export(sample))
    return sample


def random_sample(space, seed=0):
    rng = random.Random(seed)
    return {
        label: [rng.choice(list(m.values))] if hasattr(m, "n_chosen") else rng.choice(list(m.values))
        for label, m in space.simplify().items()
    }


# --- equations --------------------------------------------------------------------------------------------------------


def perturb(net):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in architecture(net).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def plain_hb_cell(cell, alphas, s0, s1):
    """(23)-(25), zero being the last of nine."""
    x = cell.preprocessors([s0, s1])
    for t, node in enumerate(cell.nodes, start=2):
        total = 0
        for k, source in enumerate((t - 1, t - 1, t - 2)):
            w = alphas[t, k].exp() / alphas[t, k].exp().sum()
            total = total + sum(w[o] * node[k][name](x[source]) for o, name in enumerate(node[k].names))
        x.append(total)
    return torch.cat(x[2:], 1)


def plain_agd_cell(cell, alphas, betas, s0, s1):
    """(28)-(29); with p = 1 it is (27)."""
    x = cell.preprocessor([s0, s1])
    for t in range(2, 2 + cell.num_nodes):
        p = torch.ones(t) if betas is None else betas[t].exp() / betas[t].exp().sum()
        total = 0
        for i in range(t):
            w = alphas[t, i].exp() / alphas[t, i].exp().sum()
            ops = cell.ops[t - 2][i]
            total = total + p[i] * sum(w[o] * ops[name](x[i]) for o, name in enumerate(cell.op_names))
        x.append(total)
    return torch.cat(x[2:], 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", SPACES)
def test_a_supernets_cell_computes_its_equation_with_its_gradients(kind, training):
    net = supernet(kind, nodes=2).train(training)
    perturb(net)
    cell = net.cells[1]
    s0 = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    s1 = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    if kind == "hb":
        parameters = {(t, k): cell.nodes[t - 2][k]._arch_alpha for t in (2, 3) for k in range(3)}
        expected = plain_hb_cell(cell, parameters, s0, s1)
        every = list(parameters.values())
    else:
        alphas = {(t, i): cell._arch_alpha[f"reduce/{t}_{i}"] for t in (2, 3) for i in range(t)}
        betas = {t: cell._arch_beta[f"reduce/{t}"] for t in (2, 3)} if kind == "agd" else None
        expected = plain_agd_cell(cell, alphas, betas, s0, s1)
        every = [*alphas.values(), *(betas or {}).values()]
    got = cell([s0, s1])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), every) for y in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert b.any()


@pytest.mark.parametrize("logit", [5.0, 40.0])
def test_a_heavy_ball_supernet_begins_as_equation_26(logit):
    """x_t = F(x_{t−1}) + x_{t−1} − x_{t−2}, up to the stated softmax weight of the two one-hot edges."""
    init = HeavyBallInit(logit)
    net = supernet("hb", initialization=init).eval()
    cell = net.cells[0]
    for node in cell.nodes:
        for k, name in ((1, "skip_connect"), (2, "neg_skip_connect")):
            names = [*node[k].names, "none"]
            weight = node[k]._arch_alpha.softmax(-1)[names.index(name)].item()
            assert weight == pytest.approx(init.weight(9), rel=1e-6)
        assert node[0]._arch_alpha.abs().max() < 0.01
    assert HeavyBallInit(5.0).weight(9) == pytest.approx(0.949, abs=5e-4)
    s = torch.randn(2, 2, 12, 8, 8, dtype=torch.float64)
    x = cell.preprocessors(list(s))
    for node in cell.nodes:
        x.append(node[0](x[-1]) + x[-1] - x[-2])
    expected, got = torch.cat(x[2:], 1), cell(list(s))
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < (1e-12 if logit == 40 else 0.5)
    assert (error > 1e-3) == (logit == 5)


@pytest.mark.parametrize("kind", SPACES)
def test_the_other_initialisations(kind):
    assert not any(p.any() for p in architecture(supernet(kind, initialization=ZeroInit())).values())
    for strategy in (DARTS(), GumbelDARTS(), StockDARTS(), StockGumbelDARTS()):
        net = supernet(kind, strategy, initialization=RandomInit(0.5))
        values = torch.cat([p.flatten() for p in architecture(net).values()])
        assert 0.3 < values[values != 0].std() < 0.7, "any strategy that has α begins with it"


# --- golden figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "weights", "alphas"), [("hb", 1_674_874, 216), ("agd", 1_971_578, 280), ("darts", 1_930_618, 224)]
)
def test_supernets_at_8_cells_of_16_channels(kind, weights, alphas):
    net = DARTS().mutate_model(SPACES[kind]())
    own = architecture(net)
    assert sum(p.numel() for p in own.values()) == alphas
    assert sum(p.numel() for p in net.parameters() if id(p) not in own) == weights
    assert set(own) <= {id(p) for p in net.parameters()}, "α and β are in state_dict"


def test_exactly_four_edges_of_a_reduction_node_group_have_stride_2():
    cell = SPACES["hb"](**SMALL).cells[1]
    strided = [choice["max_pool_3x3"][0].stride == 2 for node in cell.nodes for choice in node]
    assert sum(strided) == 4
    assert strided[:3] == [True] * 3


# --- what is exported -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
def test_zero_is_never_exported(kind):
    net = supernet(kind)
    with torch.no_grad():
        for module in choices(net):
            for parameter in module.arch_parameters():
                parameter.zero_()[-1] = 100.0  # zero is the last operation
    sample = export(net)
    assert "none" not in sample.values()
    assert net.genotype(sample).rule == net.rule


def test_hb_keeps_the_strongest_operation_of_each_edge():
    net = supernet("hb")
    node = net.cells[0].nodes[1]
    with torch.no_grad():
        node[0]._arch_alpha[node[0].names.index("dil_conv_5x5")] = 3.0
        node[2]._arch_alpha[node[2].names.index("avg_pool_3x3")] = 2.0
        node[2]._arch_alpha[-1] = 9.0
    sample = export(net)
    assert sample["normal/op_3_0"] == "dil_conv_5x5"
    assert sample["normal/op_3_2"] == "avg_pool_3x3"
    edges = net.genotype(sample).normal[1]
    assert [edge.source for edge in edges] == [2, 2, 1]


def test_agd_takes_distinct_predecessors_by_probability_and_not_by_logit():
    net = supernet("agd", initialization=ZeroInit())
    cell = net.cells[0]
    names = cell.op_names
    with torch.no_grad():
        alpha = cell._arch_alpha
        # Large logits, flat probabilities: 100 of each operation is 1/9.
        alpha["normal/4_0"].fill_(100.0)
        alpha["normal/4_1"][names.index("sep_conv_3x3")] = 3.0
        alpha["normal/4_2"][names.index("dil_conv_3x3")] = 2.0
        alpha["normal/4_3"][names.index("sep_conv_5x5")] = 2.5
        cell._arch_beta["normal/4"][2] = 1.0  # lifts 2 above 3
        cell._arch_beta["normal/4"][1] = -0.1
    sample = export(net)
    found = {sample[f"normal/input_4_{k}"][0]: sample[f"normal/op_4_{k}"] for k in range(2)}
    assert found == {1: "sep_conv_3x3", 2: "dil_conv_3x3"}


def test_probabilities_are_reported_with_zero_and_beta():
    net = supernet("agd")
    probs = net.cells[0].export_probs({})
    assert probs["normal/2_0"].keys() == set(TABLE_6)
    assert sum(probs["normal/4_1"].values()) == pytest.approx(1)
    assert probs["normal/beta_3"] == {i: pytest.approx(1 / 3) for i in range(3)}
    assert supernet("hb").cells[0].nodes[0][0].export_probs({})["normal/op_2_0"].keys() == set(TABLE_6)


@pytest.mark.parametrize("kind", SPACES)
def test_a_frozen_space_is_the_network_of_its_genotype(kind):
    """NNI's frozen network and timm's cellnet compute the same, weights copied in order."""
    torch.manual_seed(0)
    space = SPACES[kind](**SMALL)
    sample = random_sample(space)
    frozen = space.freeze(sample).double()
    options = dict(genotype=space.genotype(sample), cells=3, channels=4, num_classes=5)
    net = timm.create_model("cellnet_cifar", **options).double()
    ours, theirs = net.state_dict(), frozen.state_dict()
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]
    net.load_state_dict(dict(zip(ours, theirs.values())))
    x = images(16)
    torch.testing.assert_close(net(x), frozen(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, (MixedLayer, MixedCell)) for m in frozen.modules())
    assert all(m.affine for m in frozen.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_darts_v2_computes_what_nnis_own_hub_network_does(stem):
    choices = GENOTYPES["darts_v2"].to_nni()
    theirs = randomise(HubDARTS.frozen_factory(choices)(num_cells=6, width=4, dataset=stem).double())
    options = dict(genotype="darts_v2", cells=6, channels=4, num_classes=theirs.num_labels)
    ours = timm.create_model(f"cellnet_{stem}", **options).double()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    for size in (32, 37):
        for mode in (True, False):
            x = images(size)
            torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-10, atol=1e-10)


def test_every_sample_of_a_space_can_be_built():
    for kind, space_type in SPACES.items():
        space = space_type(**{**SMALL, "nodes": 2})
        for seed in range(5):
            assert space.freeze(random_sample(space, seed))(torch.randn(1, 3, 8, 8)).shape == (1, 5), kind


def test_imagenet_stem_and_other_inputs():
    net = supernet("hb", stem="imagenet", in_chans=1)
    assert net(torch.randn(2, 1, 64, 64, dtype=torch.float64)).shape == (2, 5)


# --- what does not go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hb", dict(cells=2), "cells=2: must be an integer ≥ 3"),
        ("hb", dict(channels=0), "channels=0: must be an integer ≥ 2"),
        ("agd", dict(nodes=0), "nodes=0: must be an integer ≥ 1"),
        ("agd", dict(num_classes=0), "num_classes=0: must be an integer ≥ 1"),
        ("darts", dict(stem="deep"), "stem='deep': must be one of 'cifar', 'imagenet'"),
        ("darts", dict(operations=["conv_7x7"]), "operations has 'conv_7x7': must be of none, max_pool_3x3"),
        ("darts", dict(operations=["none"]), r"operations=\['none'\]: must be distinct and hold one beside 'none'"),
        ("agd", dict(initialization=HeavyBallInit()), "initialization=HeavyBallInit: needs HBSpace"),
        ("hb", dict(initialization=HeavyBallInit(), operations=["skip_connect"]), "must hold 'neg_skip_connect'"),
    ],
)
def test_wrong_spaces_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        SPACES[kind](**options)


@pytest.mark.parametrize("space", SPACES.values())
def test_an_initialisation_that_is_none_is_named(space):
    with pytest.raises(TypeError, match=r"initialization=ZeroInit is a class: must be an object, ZeroInit\(…\)"):
        space(**SMALL, initialization=ZeroInit)
    with pytest.raises(TypeError, match=r"initialization='zero' has no method alpha: must have alpha\(rule, slot, na"):
        space(**SMALL, initialization="zero")


class Own:
    """An initialisation of a user's."""

    def __init__(self, make, calls=0):
        self.make, self.calls = make, calls

    def __repr__(self):
        return "Own()"

    def alpha(self, rule, slot, names):
        self.calls -= 1
        return torch.zeros(len(names)) if self.calls >= 0 else self.make(len(names))


WRONG_ALPHAS = {
    "NoneType: must be a tensor": lambda n: None,
    "list: must be a tensor": lambda n: [0.0] * n,
    "ndarray: must be a tensor": lambda n: np.zeros(n, np.float32),
    r"shape \(8,\) and dtype torch.float32: must have \(9,\)": lambda n: torch.zeros(n - 1),
    r"shape \(\) and": lambda n: torch.tensor(0.0),
    r"shape \(9, 1\) and": lambda n: torch.zeros(n, 1),
    "dtype torch.int64": lambda n: torch.zeros(n, dtype=torch.int64),
    "dtype torch.complex64": lambda n: torch.zeros(n, dtype=torch.complex64),
    r"is \[nan, .*\]: must be finite": lambda n: torch.full((n,), torch.nan),
    r"is \[.*inf\]: must be finite": lambda n: torch.eye(n)[-1] / 0,
}


@pytest.mark.parametrize("message", WRONG_ALPHAS)
@pytest.mark.parametrize(("kind", "edge"), [("hb", "normal/op_2_0"), ("agd", "normal/2_0")])
def test_what_an_own_initialisation_returns_is_checked(kind, edge, message):
    with pytest.raises(ValueError, match=rf"initialization=Own\(\): alpha of edge '{edge}' .*{message}"):
        SPACES[kind](**SMALL, initialization=Own(WRONG_ALPHAS[message]))


@pytest.mark.parametrize(
    ("kind", "call", "edge"),
    [("hb", 2, "normal/op_2_2"), ("hb", 3 + 9, "reduce/op_2_0"), ("agd", 3 + 8, "normal/4_3")],
)
def test_an_own_initialisation_is_checked_at_every_edge(kind, call, edge):
    with pytest.raises(ValueError, match=rf"alpha of edge '{edge}' is of type NoneType"):
        DARTS().mutate_model(SPACES[kind](**SMALL, initialization=Own(lambda n: None, call)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("kind", SPACES)
def test_an_own_initialisation_of_another_precision_is_taken(kind, dtype):
    own = Own(lambda n: torch.arange(n, dtype=dtype).requires_grad_() / 4)
    net = DARTS().mutate_model(SPACES[kind](**SMALL, initialization=own))
    count = len(net.operations) + 1
    betas = [m._arch_beta for m in choices(net) if hasattr(m, "_arch_beta")]
    found = [p for p in architecture(net).values() if not any(p is b for beta in betas for b in beta.values())]
    assert all(torch.equal(p.detach(), torch.arange(count) / 4) for p in found)
    assert net(torch.randn(2, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    "make",
    [HeavyBallInit, ZeroInit, lambda: RandomInit(0.5), lambda: Own(lambda n: torch.arange(n) / 2)],
    ids=["heavy ball", "zero", "random", "own"],
)
def test_nnis_proxyless_begins_with_the_initialisation(make):
    """What ours begins with, without zero, which it has not; cells of a kind share it."""
    allowed = {"normal/op_3_1": ["sep_conv_3x3", "skip_connect"]}
    found = {}
    for strategy in (Proxyless(), DARTS()):
        space = HBSpace(**SMALL, initialization=make(), allowed=allowed)
        torch.manual_seed(0)
        net = strategy.mutate_model(space)
        edges = [edge for cell in net.cells for node in cell.nodes for edge in node]
        found[type(strategy)] = {edge.label: (edge.names, edge._arch_alpha.detach()) for edge in edges}
        assert len({id(edge._arch_alpha) for edge in edges}) == len(found[type(strategy)]) == 2 * 9
    for label, (names, alpha) in found[Proxyless].items():
        assert torch.equal(alpha, found[DARTS][label][1][: len(names)]), label
        assert len(alpha) == (2 if label in allowed else 8)


def test_an_initialisation_where_there_is_no_alpha_is_refused():
    message = r"initialization=HeavyBallInit\(.*\) with strategy=RandomOneShot, which has no α to begin with: must"
    with pytest.raises(ValueError, match=message):
        RandomOneShot().mutate_model(HBSpace(**SMALL, initialization=HeavyBallInit()))
    for start in (None, ZeroInit()):
        assert RandomOneShot().mutate_model(HBSpace(**SMALL, initialization=start)) is not None


def test_wrong_initialisations_and_strategies_are_named():
    with pytest.raises(ValueError, match="logit=0: must be a finite number > 0"):
        HeavyBallInit(0)
    with pytest.raises(ValueError, match="std=inf: must be a finite number > 0"):
        RandomInit(float("inf"))
    with pytest.raises(ValueError, match="order=3: must be 1 or 2"):
        DARTS(order=3)
    with pytest.raises(ValueError, match="order=2 with a penalty"):
        DARTS(order=2, penalty=object())
    with pytest.raises(ValueError, match="order=2: must be 1, the second is defined for softmax weights: use DARTS"):
        GumbelDARTS(order=2)


@pytest.mark.parametrize("kind", ["agd", "darts"])
def test_proxyless_has_no_cells_and_says_so(kind):
    with pytest.raises(ValueError, match=r"strategy=Proxyless: NNI has no Proxyless .* use DARTS or GumbelDARTS"):
        Proxyless().mutate_model(SPACES[kind](**SMALL))


@pytest.mark.parametrize("kind", SPACES)
def test_a_sampled_supernet_runs_and_exports_no_zero(kind):
    net = RandomOneShot().mutate_model(SPACES[kind](**SMALL))
    sample = {}
    for module in net.modules():
        if hasattr(module, "resample"):
            sample.update(module.resample(sample))
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert net.genotype(sample).rule == net.rule


def test_a_sample_of_another_space_is_refused():
    hb, agd = (SPACES[kind](**SMALL) for kind in ("hb", "agd"))
    with pytest.raises(ValueError, match="sample has rule 'hb': must be 'agd', the rule of AGDSpace"):
        agd.genotype(random_sample(hb))
