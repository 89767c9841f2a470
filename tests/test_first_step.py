"""The first step of an OptNet stage: the transition block where it calls at x_0, ordinary layers elsewhere."""

import copy
from itertools import pairwise

import pytest
import timm
import torch
from equality import assert_same_function, put_strides_back, randomise
from torch import nn

from optinspired_plugins import HeavyBall, Nesterov, Unrolled, trace
from optinspired_plugins.propagation.probing import calls_at_start, layers_per_step
from optinspired_plugins.propagation.tracing import Call
from timm_models import AlgorithmStage, ProgramStage


class Extragradient:
    """x − ∇f(x − h ∇f(x)): two gradients a step, one after the other."""

    def __init__(self, h=0.5):
        self.h = h

    def init(self, x0):
        return x0

    def step(self, x, grad):
        return x - grad(x - self.h * grad(x))

    def result(self, x):
        return x


class Elsewhere(Extragradient):
    """Never asks at x_0 itself."""

    def step(self, x, grad):
        return x - grad(2 * x)


class Clone(Extragradient):
    """Asks at a copy of x_0, and is not linear."""

    def step(self, x, grad):
        g = grad(x.clone())
        return x - g / (1 + g.norm())


class Conditional(Extragradient):
    """Asks at x_0 unless the iterate is small."""

    def step(self, x, grad):
        return x - grad(x if x.abs().max() > 1e-3 else x + 1e-3)


class Restarted(nn.Module):
    """Two gradients: at x_0, and at a point that equals x_0 while the parameter is 0."""

    def __init__(self, h=0.0):
        super().__init__()
        self.h = nn.Parameter(torch.tensor(h))

    def init(self, x0):
        return x0

    def step(self, x, grad):
        return x - grad(x - self.h * grad(x))

    def result(self, x):
        return x


ALGORITHMS = {
    "constant": Extragradient,
    "parameter": lambda: Extragradient(nn.Parameter(torch.tensor(0.5))),
    "module": lambda: Restarted(0.5),
}
NETS = {
    "optnet20": dict(layers=(3, 1, 2), channels=(4, 6, 8)),
    "optnet18": dict(layers=(1, 2, 1, 1), channels=(4, 6, 8, 8)),
    "optnet50": dict(layers=(2, 1, 2, 1), channels=(4, 6, 8, 8)),
}


def build(name, algorithm, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, algorithm=algorithm, **NETS[name], **kwargs)
    return randomise(model.double())


def images():
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plain_stage(stage, u, h):
    """The extragradient method from S(u), written out."""
    T = [block for name, block in stage.named_children() if name.isdigit()]
    x = u if T[0].downsample is None else T[0].downsample(u)
    for k, (inner, outer) in enumerate(zip(T[::2], T[1::2])):
        gradient = -inner(u) if k == 0 else x - inner(x)
        z = x - h * gradient
        x = x - (z - outer(z))
    return x


def plain_forward(net, x):
    put_strides_back(net)
    x = net.act1(net.bn1(net.conv1(x)))
    if hasattr(net, "maxpool"):
        x = net.maxpool(x)
    for stage in net.stages():
        h = stage.algorithm.h if isinstance(stage, AlgorithmStage) else 0.5
        x = plain_stage(stage, x, h)
    return net.forward_head(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("name", NETS)
def test_a_stage_is_the_extragradient_method(name, kind, training):
    net = build(name, ALGORITHMS[kind]()).train(training)
    assert {type(stage) for stage in net.stages()} == {ProgramStage if kind == "constant" else AlgorithmStage}
    reference = copy.deepcopy(net)
    assert_same_function(net, reference, images(), lambda x: plain_forward(reference, x))


@pytest.mark.parametrize("options", [{}, dict(drop_path_rate=0.2), dict(init_last=0.5)], ids=str)
@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("name", NETS)
def test_every_parameter_gets_a_gradient(name, kind, options):
    net = build(name, ALGORITHMS[kind](), **options).eval()
    net(images()).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_two_layers_of_a_step_start_apart_and_drop_alike():
    net = timm.create_model("optnet50", algorithm=Extragradient(), layers=(2, 1, 2, 1), drop_path_rate=0.3)
    for stage in net.stages():
        rates = [block.drop_path.drop_prob if block.drop_path else 0 for block in stage]
        assert rates[::2] == rates[1::2]
        for one, other in pairwise(block.conv3.weight for block in stage):
            assert (one - other).abs().min() > 0
        assert [block.downsample is None for block in stage] == [i > 0 for i in range(len(stage))]


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (Extragradient(), (True, False)),
        (Extragradient(0.0), (True, True)),
        (Restarted(), (True, False)),
        (HeavyBall(nn.Parameter(torch.tensor(0.0))), (True,)),
        (Nesterov(nn.Parameter(torch.tensor(0.3))), (True,)),
        (Clone(), (True,)),
        (Elsewhere(), (False,)),
    ],
)
def test_a_call_at_the_start_is_one_whatever_is_learned(algorithm, expected):
    assert calls_at_start(algorithm, layers_per_step(algorithm, 1)[0]) == expected


def test_parameters_without_values_are_probed_too():
    with torch.device("meta"):
        algorithm = Restarted()
    assert calls_at_start(algorithm, 2) == (True, False)
    assert algorithm.h.is_meta


def test_a_probe_leaves_the_users_object_alone():
    algorithm = Restarted(0.25)
    calls_at_start(algorithm, 2)
    assert algorithm.h.item() == 0.25


def test_a_program_calls_the_transition_at_the_start_alone():
    calls = [i for i in trace(Extragradient(), 2, transition=True).instructions if isinstance(i, Call)]
    assert [call.register < 0 for call in calls] == [True, False, False, False]


def test_a_stage_that_never_asks_at_the_start_has_its_shortcut_alone():
    net = build("optnet50", Elsewhere())
    net(images()).square().sum().backward()
    assert all(p.grad.any() for p in net.parameters())
    assert {block.conv1.in_channels for block in net.layer4} == {32}


def test_a_call_that_leaves_the_start_in_a_forward_pass_keeps_its_layer():
    """∇f(z) = z − x_0 − T_0(u), so that x_1 = x_0 − ∇f(z) is T_0(u) + x_0 − 10⁻³."""
    block = build("optnet20", "gd").layer1[0].eval()
    stage = AlgorithmStage([block], Conditional(), (1,))
    assert stage.at_start == (True,)
    for u in (torch.ones(1, 4, 4, 4).double(), torch.full((1, 4, 4, 4), 1e-4).double()):
        shift = 0 if u.max() > 1e-3 else 1e-3
        torch.testing.assert_close(stage(u), block(u) + u - shift, rtol=0, atol=1e-12)


class Greedy(Extragradient):
    """Asks for one gradient more where the iterate is large."""

    def step(self, x, grad):
        x = x - grad(x)
        return x - grad(x) if x.abs().max() > 5 else x


def test_a_call_without_a_layer_is_an_error():
    stage = AlgorithmStage([build("optnet20", "gd").layer1[0].eval()], Greedy(), (1,))
    with pytest.raises(ValueError, match="step 0 of the algorithm asks for more gradients than when the network was"):
        stage(torch.full((1, 4, 4, 4), 100.0).double())


@pytest.mark.parametrize("algorithm", [Extragradient(), HeavyBall(), Nesterov()])
def test_unrolled_calls_as_many_layers_as_are_counted(algorithm):
    counts = layers_per_step(algorithm, 3)
    called = []
    layers = [[(lambda z, i=(k, j): called.append(i) or z / 2) for j in range(n)] for k, n in enumerate(counts)]
    Unrolled(algorithm, layers)(torch.ones(2))
    assert called == [(k, j) for k, n in enumerate(counts) for j in range(n)]
    layers[1].append(nn.Identity())
    with pytest.raises(ValueError, match=r"transforms\[1\] has 1 transforms too many: the algorithm asks"):
        Unrolled(algorithm, layers)(torch.ones(2))
