"""Partial channels: PC-DARTS's edge in every space, and nothing of it in chosen networks."""

import pytest
import torch
import torch.nn.functional as F
from extras import needs

needs("nni")

from nni.nas.strategy import Proxyless, RandomOneShot
from test_nni_spaces import SMALL, SPACES, architecture, export, perturb, random_sample, supernet

from nni_spaces import DARTS, GumbelDARTS, HBSpace
from nni_spaces.runs.search import make_space, make_strategy
from nni_spaces.runs.settings import SearchSettings
from nni_spaces.spaces.mixed_op import mixed_op
from optinspired_plugins.cells.network import plan_cells
from optinspired_plugins.cells.operations import make_operation


def plain_edge(alpha, operations, x, parts, stride):
    """Xu et al. 2020, with index lists for the shuffle and a padded reshape for the pooling; zero is the last α."""
    w = alpha.exp() / alpha.exp().sum()
    kept = x.shape[1] // parts
    mixed = sum(w[o] * operation(x[:, :kept]) for o, operation in enumerate(operations.values()))
    rest = x[:, kept:]
    if stride == 2:
        rest = F.pad(rest, (0, rest.shape[3] % 2, 0, rest.shape[2] % 2), value=-torch.inf)
        b, c, h, width = rest.shape
        rest = rest.reshape(b, c, h // 2, 2, width // 2, 2).amax((3, 5))
    order = [group * kept + i for i in range(kept) for group in range(parts)]
    return torch.cat([mixed, rest], 1)[:, order]


def edges_of(net, cell):
    """Yield target, source, operations, α and weight of each edge."""
    if net.rule == "hb":
        for t, node in enumerate(cell.nodes, start=2):
            for edge, source in zip(node, (t - 1, t - 1, t - 2)):
                yield t, source, {name: edge[name] for name in edge.names}, edge._arch_alpha, 1
        return
    for t, sources in enumerate(cell.ops, start=2):
        beta = cell._arch_beta[f"{cell.label}/{t}"] if hasattr(cell, "_arch_beta") else None
        for i, operations in enumerate(sources):
            p = 1 if beta is None else beta.exp()[i] / beta.exp().sum()
            yield t, i, operations, cell._arch_alpha[f"{cell.label}/{t}_{i}"], p


def plain_cell(net, cell, parts, reduction, s0, s1):
    x = (cell.preprocessors if net.rule == "hb" else cell.preprocessor)([s0, s1])
    for t, source, operations, alpha, p in edges_of(net, cell):
        term = p * plain_edge(alpha, operations, x[source], parts, 2 if reduction and source < 2 else 1)
        x[t:] = [x[t] + term if len(x) > t else term]
    return torch.cat(x[2:], 1)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 3)])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("kind", SPACES)
def test_a_cell_mixes_some_channels_and_passes_the_others(kind, parts, size):
    net = supernet(kind, nodes=2, partial_channels=parts).eval()
    perturb(net)
    for cell, reduction in ((net.cells[0], False), (net.cells[1], True)):
        s0 = torch.randn(2, 12, *size, dtype=torch.float64, requires_grad=True)
        s1 = torch.randn(2, 8 if reduction else 12, *size, dtype=torch.float64, requires_grad=True)
        expected, got = plain_cell(net, cell, parts, reduction, s0, s1), cell([s0, s1])
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        every = [s0, s1, *{id(p): p for m in cell.modules() for p in getattr(m, "arch_parameters", list)()}.values()]
        weight = torch.randn_like(got)
        for a, b in zip(*(torch.autograd.grad((y * weight).sum(), every) for y in (got, expected))):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
            assert b.any()
        assert len(every) == 2 + {"hb": 6, "agd": 5 + 2, "darts": 5 + 2}[kind], "α, and β of the nodes that choose"


def test_a_shuffle_interleaves_equal_groups():
    x = torch.arange(8.0).reshape(1, 8, 1, 1)
    shuffled = mixed_op(torch.tensor([1.0, 0.0]), {"skip_connect": torch.nn.Identity()}, x, 4)
    assert shuffled.flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("kind", SPACES)
def test_all_channels_and_all_candidates_are_the_plain_supernet_to_the_bit(kind):
    plain = supernet(kind)
    names = [*plain.operations, "none"]
    options = dict(partial_channels=1, skip_dropout=0.0, allowed=dict.fromkeys(plain.edge_labels(3), names))
    other = supernet(kind, **options)
    ours, theirs = plain.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(plain(x), other(x))


@pytest.mark.parametrize(
    ("kind", "weights", "alphas"), [("hb", 271_354, 216), ("agd", 302_138, 280), ("darts", 299_578, 252)]
)
def test_supernets_at_8_cells_of_16_channels_of_which_4_are_mixed(kind, weights, alphas):
    net = DARTS().mutate_model(SPACES[kind](partial_channels=4))
    own = architecture(net)
    assert sum(p.numel() for p in own.values()) == alphas
    assert sum(p.numel() for p in net.parameters() if id(p) not in own) == weights

    def edge(channels, stride):
        made = (make_operation(name, channels, stride, affine=False) for name in net.operations)
        return sum(p.numel() for operation in made for p in operation.parameters())

    strided, every = {"hb": (4, 12)}.get(kind, (8, 14))
    counts = [(p.channels, strided if p.reduction else 0) for p in plan_cells(8, 16, 4, "cifar")]
    saved = sum(n * (edge(c, 2) - edge(c // 4, 2)) + (every - n) * (edge(c, 1) - edge(c // 4, 1)) for c, n in counts)
    assert weights + saved == {"hb": 1_674_874, "agd": 1_971_578, "darts": 1_930_618}[kind]


@pytest.mark.parametrize("strategy", [DARTS, GumbelDARTS])
@pytest.mark.parametrize("kind", SPACES)
def test_a_chosen_network_has_all_channels(kind, strategy):
    net = supernet(kind, strategy(), partial_channels=4)
    net(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    sample = export(net)
    plain = SPACES[kind](**SMALL).freeze(sample)
    chosen = net.freeze(sample)
    assert [(n, p.shape) for n, p in chosen.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]
    chosen.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(chosen(x), plain(x))


@pytest.mark.parametrize("kind", SPACES)
def test_random_samples_have_all_channels(kind):
    space = SPACES[kind](**SMALL, partial_channels=4)
    sample = random_sample(space)
    shapes = [p.shape for p in space.freeze(sample).parameters()]
    assert shapes == [p.shape for p in SPACES[kind](**SMALL).freeze(sample).parameters()]


def test_what_does_not_go_is_named():
    with pytest.raises(ValueError, match="channels=18: must be divisible by partial_channels=4"):
        HBSpace(channels=18, partial_channels=4)
    with pytest.raises(ValueError, match="partial_channels=0: must be an integer ≥ 1"):
        HBSpace(partial_channels=0)
    for kind, strategy in (("hb", Proxyless), ("hb", RandomOneShot), ("agd", RandomOneShot)):
        message = f"partial_channels=2 with strategy={strategy.__name__}: must be 1, or use DARTS or GumbelDARTS"
        with pytest.raises(ValueError, match=message):
            strategy().mutate_model(SPACES[kind](**SMALL, partial_channels=2))


def test_a_strategys_settings():
    settings = SearchSettings(strategy="pc-darts")
    assert (settings.partial_channels, settings.warmup_epochs) == (4, 15)
    settings = SearchSettings(strategy="pc-darts", partial_channels=2, warmup_epochs=0, epochs=10)
    assert (settings.partial_channels, settings.warmup_epochs) == (2, 0)
    assert make_strategy(settings).warmup_epochs == 0
    assert make_space(settings, 10, 3).options.partial_channels == 2
    settings = SearchSettings(strategy="p-darts", epochs=25)
    assert (settings.partial_channels, settings.warmup_epochs) == (1, 10)
    assert (SearchSettings().partial_channels, SearchSettings().warmup_epochs) == (1, 0)
    with pytest.raises(ValueError, match="warmup_epochs=5: must be < epochs=5"):
        SearchSettings(epochs=5, warmup_epochs=5)
    with pytest.raises(ValueError, match="warmup_epochs=-1: must be an integer ≥ 0"):
        SearchSettings(warmup_epochs=-1)
    with pytest.raises(ValueError, match="channels=6: must be divisible by partial_channels=4"):
        SearchSettings(channels=6, strategy="pc-darts")
