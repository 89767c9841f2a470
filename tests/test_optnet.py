"""OptNet: every algorithm as a network of ResNet's shape, and HBNet as one of them."""

import copy
import re
from functools import partial

import pytest
import timm
import torch
from equality import assert_same_function, put_strides_back, randomise, without_rules
from my_algorithms import LearnedHeavyBall, OptimizedGradient
from timm.optim import create_optimizer_v2
from torch import nn

from optinspired_plugins import HeavyBall, Nesterov, TwoPath, Unrolled, two_path
from timm_models import NETWORK_ALGORITHMS, AlgorithmStage, HeavyBallStage, OptNet, ProgramStage
from timm_models.stages.algorithm import make_stage

NAMES = list(NETWORK_ALGORITHMS)
OWN = {"ogm": OptimizedGradient, "learned": LearnedHeavyBall}


def build(algorithm, name="optnet20", **kwargs):
    torch.manual_seed(0)
    if name == "optnet20":
        kwargs = dict(layers=(4, 1, 3), channels=(4, 6, 8), **kwargs)
    return randomise(timm.create_model(name, num_classes=5, algorithm=algorithm, **kwargs).double())


def images(size=16):
    return torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """ResNet's transition block T_0(u) + S(u) as a function of z = x_0 = S(u): T_0(u) + z."""

    def __init__(self, T, u):
        super().__init__()
        self.T, self.u = [T], u

    def forward(self, z):
        return self.T[0](self.u) + z


def plain_stage(stage, algorithm, u):
    """What a stage must compute: the algorithm unrolled from S(u) over the stage's layers."""
    T = [m for n, m in stage.named_children() if n.isdigit()]
    start = T[0].downsample(u) if T[0].downsample is not None else u
    paths = 2 if isinstance(algorithm, (TwoPath, type(NETWORK_ALGORITHMS["admm"]()))) else 1
    T = [Residual(t, u) for t in T[:paths]] + T[paths:]
    groups = T if paths == 1 else [T[k : k + 2] for k in range(0, len(T), 2)]
    return Unrolled(algorithm, groups)(start)


def plain_forward(net, x, make):
    put_strides_back(net)
    x = net.act1(net.bn1(net.conv1(x)))
    for stage in net.stages():
        x = plain_stage(stage, getattr(stage, "algorithm", None) or make(), x)
    return net.forward_head(x)


# --- theorems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_a_network_is_its_algorithm_unrolled(name, training):
    make = NETWORK_ALGORITHMS.get(name) or OWN[name]
    net = build(name if name in NAMES else make()).train(training)
    reference = copy.deepcopy(net)
    assert_same_function(net, reference, images(), lambda x: plain_forward(reference, x, make))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("opt", "hb"), [("optnet20", "hbnet20"), ("optnet18", "hbnet18"), ("optnet50", "hbnet50")])
def test_hbnet_is_the_heavy_ball_case(opt, hb, training):
    """The same state dict, the same function, and with it the same place in every table."""
    depth = dict(layers=(2, 3, 1)) if hb == "hbnet20" else dict(layers=(2, 1, 3, 1))
    reference = randomise(timm.create_model(hb, num_classes=5, **depth).double()).train(training)
    for algorithm in ("hb", HeavyBall(1.0)):
        net = timm.create_model(opt, num_classes=5, algorithm=algorithm, **depth).double().train(training)
        net.load_state_dict(reference.state_dict(), strict=True)
        assert_same_function(net, copy.deepcopy(reference), images(32))


def test_the_heavy_ball_program_is_the_heavy_ball_stage_to_the_bit():
    net = build("hb")
    blocks = copy.deepcopy(list(net.layer1))
    u = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert torch.equal(HeavyBallStage(blocks).eval()(u), net.layer1.eval()(u))


@pytest.mark.parametrize("name", NAMES)
def test_program_and_algorithm_stages_agree(name):
    """The fast stage against the one that runs the algorithm's own code."""
    net = build(name)
    stage = net.layer1
    assert isinstance(stage, ProgramStage)
    algorithm = NETWORK_ALGORITHMS[name]()
    layers = (2,) * 4 if len(stage) == 8 else (1,) * 4
    slow = AlgorithmStage(copy.deepcopy(list(stage)), algorithm, layers)
    u = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert_same_function(stage, slow, u)


def test_dmrnet_is_the_last_row_of_table_3():
    """Rule (20) with ½ of the newest states, from the residual transition of both paths on."""
    net = build("dmrnet")
    u = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    T = list(net.layer1.eval())
    first, second = T[0](u) + u, T[1](u) + u
    for k in (2, 4, 6):
        shared = first / 2 + second / 2
        first, second = T[k](first) + shared, T[k + 1](second) + shared
    torch.testing.assert_close(net.layer1(u), (first + second) / 2, rtol=1e-12, atol=1e-12)


def test_two_path_algorithm_is_rule_20_behind_its_first_step():
    T = [nn.Linear(3, 3).double() for _ in range(8)]
    x = torch.randn(2, 3, dtype=torch.float64)
    pairs = list(zip(T[::2], T[1::2]))
    one, two = pairs[0][0](x), pairs[0][1](x)
    for a, b in pairs[1:]:
        shared = 0.2 * one + 0.7 * two
        one, two = a(one) + shared, b(two) + shared
    got = Unrolled(TwoPath(0.2, 0.7), pairs)(x)
    torch.testing.assert_close(got, (one + two) / 2, rtol=1e-12, atol=1e-12)
    # Where both paths are one, the rule itself gives the same from there on.
    rows = [torch.zeros(max(k, 1), dtype=torch.float64) for k in range(3)]
    newest = [torch.cat([row[1:], torch.ones(1, dtype=torch.float64)]) for row in rows]
    same = [(b, b) for _, b in pairs]
    expected = two_path(same[1:], same[0][0](x), [0.2 * r for r in newest], [0.7 * r for r in newest])[-1]
    torch.testing.assert_close(Unrolled(TwoPath(0.2, 0.7), same)(x), expected[0], rtol=1e-12, atol=1e-12)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gd", "hb", "agd", "agd2"])
def test_one_path_costs_resnets_parameters_and_takes_its_state_dict(name):
    net = timm.create_model("optnet50", algorithm=name, device="meta")
    assert sum(p.numel() for p in net.parameters()) == 25_557_032
    state = without_rules(net.state_dict())
    assert state.keys() == timm.create_model("resnet50", device="meta").state_dict().keys()


@pytest.mark.parametrize("name", ["admm", "dmrnet"])
def test_two_paths_share_stem_shortcuts_and_head(name):
    one = timm.create_model("optnet50", algorithm="gd", device="meta")
    two = timm.create_model("optnet50", algorithm=name, device="meta")
    transforms = sum(p.numel() for n, p in one.named_parameters() if n.startswith("layer") and ".downsample." not in n)
    assert sum(p.numel() for p in two.parameters()) == 25_557_032 + transforms
    assert len(two.layer1) == 2 * len(one.layer1)
    net = build(name)
    first, second = (block.conv1.weight for block in list(net.layer1)[:2])
    assert (first - second).abs().min() > 0, "the paths start apart"


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_every_parameter_gets_a_gradient(name):
    net = build(name if name in NAMES else OWN[name]())
    net(images()).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # A stage of one step has no earlier iterate for its momentum to act on.
    assert without == (["layer2.algorithm.beta"] if name == "learned" else [])


def test_learned_coefficients_are_a_stages_own_and_escape_weight_decay():
    net = build(LearnedHeavyBall(0.5))
    names = {f"layer{k}.algorithm.beta" for k in (1, 2, 3)}
    assert names <= net.state_dict().keys()
    assert net.no_weight_decay() == names
    assert isinstance(net.layer1, AlgorithmStage)
    optimizer = create_optimizer_v2(net, "sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    last = dict(net.named_parameters())
    assert scale[id(last["layer3.algorithm.beta"])] >= scale[id(last["layer3.0.conv1.weight"])]
    assert scale[id(last["layer1.algorithm.beta"])] < scale[id(last["layer3.0.conv1.weight"])]


def test_a_parameter_held_by_a_plain_algorithm_is_learned():
    net = build(HeavyBall(nn.Parameter(torch.tensor(0.5))))
    assert "layer1.algorithm.beta" in net.state_dict()
    net(images()).square().sum().backward()
    assert net.layer1.algorithm.beta.grad.any()
    with torch.no_grad():
        before = net(images())
        net.layer1.algorithm.beta.fill_(0.9)
        assert not torch.equal(net(images()), before)


def test_moving_a_network_moves_what_its_algorithm_uses():
    """to_empty makes new parameters; the algorithm must use those."""
    net = timm.create_model("optnet20", layers=(2, 1, 1), algorithm=HeavyBall(nn.Parameter(torch.tensor(0.5))))
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    x = images().float()
    expected = net.eval()(x)
    moved = copy.deepcopy(net).to("meta").to_empty(device="cpu")
    moved.load_state_dict(weights)
    torch.testing.assert_close(moved.eval()(x), expected)
    moved.layer1.algorithm.beta.data.fill_(0.0)
    assert not torch.equal(moved(x), expected)


# --- what a user may pass ---------------------------------------------------------------------------------------------


def test_names_classes_objects_and_modules_are_algorithms():
    for algorithm in ("my_algorithms:OptimizedGradient", OptimizedGradient, OptimizedGradient()):
        net = timm.create_model("optnet20", algorithm=algorithm, num_classes=3)
        assert net(images().float()).shape == (3, 3)
    assert isinstance(timm.create_model("optnet18"), OptNet)


def test_device_and_dtype_reach_a_learned_coefficient():
    net = timm.create_model("optnet20", algorithm=LearnedHeavyBall(), dtype=torch.bfloat16, device="meta")
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in net.parameters())


def test_the_users_object_is_left_alone():
    own = LearnedHeavyBall(0.5)
    net = build(own)
    assert net.layer1.algorithm is not own
    assert own.beta.dtype == torch.float32


class Base:
    def init(self, x0):
        return x0

    def step(self, state, grad):
        return state - grad(state)

    def result(self, state):
        return state


class Pooling(Base):
    def result(self, state):
        return state.mean((2, 3))


class Idle(Base):
    def step(self, state, grad):
        return state


class Exploding(Base):
    def step(self, state, grad):
        return state - float("inf") * grad(state)


class Incomplete:
    def init(self, x0):
        return x0


@pytest.mark.parametrize(
    ("algorithm", "error", "message"),
    [
        (
            "newton",
            ValueError,
            "algorithm='newton': must be one of gd, hb, agd, agd2, admm, dmrnet, tmm, chebyshev, ogm, km, halpern",
        ),
        ("my_algorithms:Missing", ValueError, "module my_algorithms has no attribute Missing"),
        ("no_such_module:A", ModuleNotFoundError, "no_such_module"),
        (Incomplete(), TypeError, r"has no method step and no method result: must have init\(x0\)"),
        (3, TypeError, "algorithm=3 has no method init"),
        (Pooling(), ValueError, r"step 0 of Pooling makes of shape \(1, 2, 3, 3\) the result \(1, 2\)"),
        (Idle(), ValueError, "step 0 of Idle asks for no gradient: a step must have a layer"),
        (Exploding(), ValueError, "step 0 of Exploding gives a result that is not finite"),
    ],
)
@pytest.mark.parametrize("name", ["optnet20", "optnet50"])
def test_what_is_no_algorithm_is_named(name, algorithm, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, algorithm=algorithm)


@pytest.mark.parametrize("layers", [(0, 1, 1), (1, 0, 1, 1), (1, 1), 3, "3463"])
@pytest.mark.parametrize(("name", "stages"), [("optnet20", 3), ("optnet50", 4)])
def test_layers_that_are_none_are_named(name, stages, layers):
    message = (
        rf"layers(\[\d\]=0: must be an integer ≥ 1|={re.escape(repr(layers))}: must be a sequence of {stages} integers)"
    )
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, layers=layers)


def test_options_of_the_other_families_are_refused():
    for option in (dict(beta1=1.0), dict(post_act=True), dict(nonsense=1)):
        with pytest.raises(TypeError):
            timm.create_model("optnet20", **option)


# --- how it runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_holds_no_more_than_its_recurrence_needs(name):
    """Slots do not grow with depth, but for the summed form, which remembers everything."""
    slots = {}
    for steps in (6, 12):
        paths = 2 if name in ("admm", "dmrnet") else 1
        net = timm.create_model("optnet20", layers=(steps, 1, 1), algorithm=name, channels=(2, 2, 2))
        slots[steps] = net.layer1.slots
        assert len(net.layer1) == paths * steps
    assert (slots[6] == slots[12]) == (name != "agd2")


def test_a_stateful_algorithm_that_is_not_linear_still_works():
    class Normalised(Base):
        """A step of unit length: no program can hold it."""

        def step(self, state, grad):
            g = grad(state)
            return state - g / g.norm()

    net = build(Normalised())
    assert isinstance(net.layer1, AlgorithmStage)
    assert net(images()).isfinite().all()


@pytest.mark.parametrize("algorithm", ["admm", LearnedHeavyBall()])
def test_checkpointing_changes_no_gradient(algorithm):
    net = build(algorithm).eval()
    reference = copy.deepcopy(net)
    net.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in net.stages())
    assert_same_function(net, reference, images())


def test_nesterov_with_constant_momentum_is_an_algorithm_too():
    net = build(Nesterov(0.4))
    reference = copy.deepcopy(net)
    assert_same_function(net, reference, images(), lambda x: plain_forward(reference, x, partial(Nesterov, 0.4)))


def test_make_stage_prefers_the_program():
    blocks = list(build("gd").layer1)
    assert isinstance(make_stage(blocks, HeavyBall(), (1,) * 4), ProgramStage)
    assert isinstance(make_stage(blocks, LearnedHeavyBall(), (1,) * 4), AlgorithmStage)


def test_a_learned_algorithm_compiles_into_one_graph():
    net, x = build(LearnedHeavyBall(0.5)), images()
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    assert_same_function(net, compiled._orig_mod, x, lambda x: compiled(x))
