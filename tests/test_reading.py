"""The residual reading ∇f(z) = −T(z): gradient descent is ResNet, and every algorithm keeps its identity path."""

import copy

import pytest
import timm
import torch
from equality import assert_same_function, randomise
from extras import needs_version
from my_algorithms import LearnedHeavyBall, OptimizedGradient
from timm.models import save_for_hf

from optinspired_plugins import ALGORITHMS, GradientDescent, HeavyBall, Nesterov, Unrolled, momentum, trace
from optinspired_plugins.propagation.tracing import READINGS
from timm_models import NETWORK_ALGORITHMS, AlgorithmStage, ProgramStage, hbnet
from timm_models.stages.algorithm import make_stage

METHODS = {**ALGORITHMS, "ogm": OptimizedGradient, "hb1": lambda: HeavyBall(1.0)}
SMALL = dict(layers=(4, 1, 3), channels=(4, 6, 8), num_classes=5)


def layers(count=6):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count, 4, 4, dtype=torch.float64, generator=generator)
    return [lambda z, w=w: torch.tanh(z @ w) for w in weights]


def point():
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def images():
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(name="optnet20", **kwargs):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **{**SMALL, **kwargs}).double())


def unrolled(algorithm):
    return Unrolled(algorithm, layers(), reading="residual")(point())


def test_gradient_descent_is_resnet():
    x = point()
    for T in layers():
        x = x + T(x)
    assert torch.equal(unrolled(GradientDescent()), x)


def test_the_heavy_ball_is_momentum_resnet():
    """It is x + T(x) + β (x − x_prev); with v = x − x_prev, v ← β v + T(x), x ← x + v."""
    x, v = point(), 0.0
    for T in layers():
        v = 0.9 * v + T(x)
        x = x + v
    torch.testing.assert_close(unrolled(HeavyBall(0.9)), x, rtol=1e-12, atol=1e-12)


def test_nesterov_is_y_plus_t_of_y():
    x = x_prev = point()
    betas = [0.0, *momentum(len(layers())).tolist()]
    for T, beta in zip(layers(), betas):
        y = x + beta * (x - x_prev)
        x, x_prev = y + T(y), x
    torch.testing.assert_close(unrolled(Nesterov()), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 18])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_its_identity_path(name, steps):
    """With ∇f = 0 a method stays at x_0; by the fixed-point reading, T = 0 moves it to 0."""
    gains = trace(METHODS[name](), steps, True, "residual").gains()
    assert gains[0] == pytest.approx(1)
    zero = [lambda z: torch.zeros_like(z)] * 2 if name == "admm" else lambda z: torch.zeros_like(z)
    torch.testing.assert_close(Unrolled(METHODS[name](), [zero] * steps, reading="residual")(point()), point())


@pytest.mark.parametrize("name", ["gd", "hb", "agd"])
def test_a_zero_start_is_safe(name):
    net = timm.create_model("optnet20", algorithm=name, reading="residual", init_last="zero", **SMALL)
    u = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(net.layer1(u), u)
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    weights = [T.last_norm().weight for stage in net.stages() for T in stage.transforms()]
    assert all(weight.grad.abs().max() > 0 for weight in weights), "each γ gets a gradient"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("algorithm", "betas"),
    [("gd", dict(beta1=1.0, beta2=0.0)), (HeavyBall(0.5), dict(beta1=1.5, beta2=-0.5))],
    ids=["gd", "hb"],
)
def test_networks_of_two_terms_are_hbnets(algorithm, betas, training):
    """The same state dict: (1, 0) is ResNet without its last activations, (1 + β, −β) momentum ResNet."""
    net = build(algorithm=algorithm, reading="residual", final_norm=False).train(training)
    other = build("hbnet20", **betas).train(training)
    other.load_state_dict(net.state_dict(), strict=True)
    assert_same_function(net, other, images())


@pytest.mark.parametrize("name", sorted(NETWORK_ALGORITHMS.keys() - {"dmrnet"}))
def test_program_and_algorithm_stages_agree(name):
    algorithm = NETWORK_ALGORITHMS[name]()
    stage = build(algorithm=name, reading="residual").layer1
    assert isinstance(stage, ProgramStage)
    groups = (len(stage) // 4,) * 4
    slow = AlgorithmStage(copy.deepcopy(list(stage)), algorithm, groups, "residual")
    assert_same_function(stage, slow, torch.randn(2, 4, 8, 8, dtype=torch.float64))
    fixed = make_stage(copy.deepcopy(list(stage)), algorithm, groups)
    assert not torch.allclose(fixed(images().repeat(1, 2, 1, 1)[:, :4]), stage(images().repeat(1, 2, 1, 1)[:, :4]))


def first_losses(**kwargs):
    """Train 56 layers as typed for 20 steps at the paper's rate, without a warm-up."""
    torch.manual_seed(0)
    net = timm.create_model("optnet56", channels=(4, 4, 4), num_classes=4, **kwargs)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    labels, losses = torch.arange(16) % 4, []
    x = torch.randn(16, 3, 8, 8) + torch.randn(4, 3, 8, 8)[labels]
    for _ in range(20):
        losses.append(torch.nn.functional.cross_entropy(net(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        (name, reading)
        for reading in READINGS
        for name in NETWORK_ALGORITHMS
        if (name, reading) != ("dmrnet", "residual")
    ],
)
def test_every_algorithm_trains_as_typed(name, reading):
    losses = first_losses(algorithm=name, reading=reading)
    assert losses.max() < 2 * losses[0]
    assert losses[-1] < losses[0] * (0.6 if reading == "residual" else 0.95)


def test_without_the_final_normalisation_momentum_explodes():
    assert first_losses(algorithm="hb", reading="residual", final_norm=False).max() > 100


@pytest.mark.parametrize("name", ["optnet20", "optnet18"])
def test_the_final_normalisation_follows_the_reading(name):
    for kwargs, on in (
        ({}, False),
        (dict(reading="residual"), True),
        (dict(reading="residual", final_norm=False), False),
    ):
        assert (timm.create_model(name, **kwargs).norm is not None) == on
    with pytest.raises(ValueError, match="final_norm='auto': must be True or False"):
        timm.create_model(name, final_norm="auto")


def test_an_algorithm_that_moves_without_a_gradient_has_no_residual_reading():
    """DMRNet's two paths add up: h is 2^(n − 1)."""
    for name, layers, h in (("optnet20", (3, 8, 2), 128), ("optnet18", (3, 3, 3, 3), 4)):
        message = f"reading='residual': where T = 0, {max(layers)} steps of this algorithm multiply the input by {h}, "
        with pytest.raises(ValueError, match=message):
            timm.create_model(name, layers=layers, algorithm="dmrnet", reading="residual")


def test_the_start_counts_the_sum_of_momentum():
    """w_j = (1 − β^(n−j)) / (1 − β): γ of a learned and of a constant β is the same."""
    options = dict(reading="residual", init_last="auto", layers=(9, 1, 1))
    expected = sum(((1 - 0.5**k) / 0.5) ** 2 for k in range(1, 10)) ** -0.5
    for algorithm in (HeavyBall(0.5), LearnedHeavyBall(0.5)):
        net = timm.create_model("optnet20", algorithm=algorithm, **{**SMALL, **options})
        weight = net.layer1.transforms()[0].last_norm().weight
        torch.testing.assert_close(weight, torch.full_like(weight, expected))


def test_a_checkpoint_of_the_other_reading_is_refused_by_name():
    readings = ("residual", "fixed-point")
    residual, fixed = (build(algorithm="gd", reading=reading, final_norm=False) for reading in readings)
    with pytest.raises(RuntimeError, match="reading='residual', this one reading='fixed-point': pass reading='res"):
        fixed.load_state_dict(residual.state_dict())
    with pytest.raises(RuntimeError, match="reading='fixed-point', this one reading='residual': pass reading='fix"):
        residual.load_state_dict(fixed.state_dict())


@needs_version("timm", "1.0.31", "keeps no record of a model's arguments")
@pytest.mark.parametrize("algorithm", ["agd", OptimizedGradient()], ids=["name", "data"])
def test_a_published_network_keeps_its_reading(algorithm, tmp_path):
    net = timm.create_model("optnet20", algorithm=algorithm, reading="residual", layers=(3, 2, 1)).eval()
    if not hasattr(net, "_model_args"):
        pytest.skip("this timm does not save arguments")
    save_for_hf(net, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images().float()), net(images().float()))


def test_another_reading_is_named():
    message = "reading='momentum': must be one of 'fixed-point', 'residual'"
    for name in ("optnet20", "optnet18"):
        with pytest.raises(ValueError, match=message):
            timm.create_model(name, reading="momentum")
    with pytest.raises(ValueError, match=message):
        trace(HeavyBall(), 3, reading="momentum")
    with pytest.raises(ValueError, match=message):
        Unrolled(HeavyBall(), layers(), reading="momentum")
    assert not hasattr(hbnet.HBNet, "reading")
