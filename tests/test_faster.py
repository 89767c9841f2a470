"""Algorithms beyond section 3: their rates on quadratics and on nonexpansive maps, and the networks they give."""

import math

import my_algorithms
import pytest
import timm
import torch
from equality import assert_same_function, randomise

from optinspired_plugins import HeavyBall, Nesterov, Unrolled, minimize, trace
from optinspired_plugins.algorithms.faster import (
    FASTER,
    Chebyshev,
    Halpern,
    KrasnoselskiiMann,
    OptimizedGradient,
    TwoStep,
)

MU = 0.01
EIGENVALUES = torch.linspace(MU, 1, 4001, dtype=torch.float64)


def quadratic(z):
    return EIGENVALUES * z


def factors(algorithm, steps):
    """The largest factor of an error over all eigenvalues, after 0, 1, … steps."""
    return minimize(algorithm, quadratic, torch.ones_like(EIGENVALUES), steps).abs().amax(1)


def rate(algorithm, steps=400):
    found = factors(algorithm, steps)
    return (found[steps] / found[steps // 2]).item() ** (2 / steps)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
def test_heavy_ball_and_nesterov_are_points_of_the_two_step_method(beta):
    for special, general in ((HeavyBall(beta), TwoStep(1.0, beta)), (Nesterov(beta), TwoStep(1.0, beta, beta))):
        expected = minimize(special, quadratic, torch.ones_like(EIGENVALUES), 30)
        got = minimize(general, quadratic, torch.ones_like(EIGENVALUES), 30)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_triple_momentum_has_the_rate_of_its_theorem():
    """The rate is ρ = 1 − √(μ/L), and L only sets the unit of the gradient."""
    rho = 1 - math.sqrt(MU)
    found = rate(TwoStep.triple_momentum(1.0, MU))
    assert found <= rho * 1.002
    assert found < rate(TwoStep(1.0)), "gradient descent"
    scaled = TwoStep.triple_momentum(4.0, 4 * MU)
    got = minimize(scaled, lambda z: 4 * quadratic(z), torch.ones_like(EIGENVALUES), 20)
    expected = minimize(TwoStep.triple_momentum(1.0, MU), quadratic, torch.ones_like(EIGENVALUES), 20)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_robust_momentum_goes_from_triple_momentum_to_gradient_descent():
    fast, slow = 1 - math.sqrt(MU), 1 - MU
    got, expected = TwoStep.robust_momentum(fast, 1.0, MU), TwoStep.triple_momentum(1.0, MU)
    for name in ("alpha", "beta", "gamma"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name))
    for rho in (fast, 0.95, slow):
        assert rate(TwoStep.robust_momentum(rho, 1.0, MU)) <= rho * 1.002
    assert rate(TwoStep.robust_momentum(slow, 1.0, MU)) == pytest.approx(rate(TwoStep(1.0)), rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40])
def test_chebyshev_has_the_smallest_worst_factor_in_every_number_of_steps(steps):
    """The residual polynomial is Chebyshev's: its maximum over [μ, L] is 1 / C_k((κ + 1)/(κ − 1))."""
    expected = 1 / math.cosh(steps * math.acosh((1 + MU) / (1 - MU)))
    assert factors(Chebyshev(1.0, MU), steps)[steps].item() == pytest.approx(expected, rel=1e-6)
    for other in (HeavyBall.strongly_convex(1.0, MU), Nesterov(), TwoStep.triple_momentum(1.0, MU), TwoStep(1.0)):
        assert factors(other, steps)[steps].item() >= expected * (1 - 1e-9)


def test_the_optimised_gradient_method_keeps_the_bound_of_its_theorem():
    """f(z_{k+1}) ≤ 1 / (4 t_k²) for f(z) = λ z² / 2 and z_0 = 1; gradient descent does not keep it."""
    bound, t = [], 1.0
    for _ in range(200):
        bound.append(1 / (4 * t**2))
        t = (1 + math.sqrt(1 + 4 * t**2)) / 2
    eigenvalues = torch.logspace(-6, 0, 2001, dtype=torch.float64)

    def values(algorithm):
        iterates = minimize(algorithm, lambda z: eigenvalues * z, torch.ones_like(eigenvalues), 200)[1:]
        return (eigenvalues * iterates**2 / 2).amax(1)

    bounds = torch.tensor(bound, dtype=torch.float64)
    assert (values(OptimizedGradient()) <= bounds).all()
    assert not (values(TwoStep(1.0)) <= bounds).all()


def test_the_users_example_is_the_same_method():
    expected = minimize(my_algorithms.OptimizedGradient(), quadratic, torch.ones_like(EIGENVALUES), 30)
    got = minimize(OptimizedGradient(), quadratic, torch.ones_like(EIGENVALUES), 30)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def turned(z):
    """Return z − R z for rotations R by many angles: R is nonexpansive, and no gradient step."""
    angles = torch.linspace(0.001, math.pi, 500, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    return z - torch.stack([cos * z[0] - sin * z[1], sin * z[0] + cos * z[1]])


def residuals(algorithm, steps):
    """The norms ‖z_k − R z_k‖, largest over the angles; ‖z_0 − z*‖ is 1."""
    z0 = torch.zeros(2, 500, dtype=torch.float64)
    z0[0] = 1
    iterates = minimize(algorithm, turned, z0, steps)
    return torch.stack([turned(z).norm(dim=0).max() for z in iterates])


def test_halpern_and_averaging_find_fixed_points_at_their_rates():
    k = torch.arange(201, dtype=torch.float64)
    assert (residuals(Halpern(), 200) <= 2 / (k + 1) + 1e-12).all()
    for theta in (0.3, 0.5):
        assert (residuals(KrasnoselskiiMann(theta), 200) <= 1 / (theta * (1 - theta) * (k + 1)).sqrt() + 1e-12).all()
    assert residuals(Halpern(), 200)[-1] < 0.5 * residuals(KrasnoselskiiMann(), 200)[-1]
    assert residuals(TwoStep(1.0), 200)[-1] == pytest.approx(2), "T alone only turns"


@pytest.mark.parametrize("steps", [1, 2, 5, 18])
def test_halpern_keeps_a_path_to_the_input(steps):
    assert trace(Halpern(), steps).gains()[0] == pytest.approx(1 / (steps + 1))
    assert trace(Halpern(), steps, transition=True).gains()[0] >= 1 / (steps + 1)


@pytest.mark.parametrize("reading", ["fixed-point", "residual"])
@pytest.mark.parametrize("name", FASTER)
def test_every_algorithm_is_a_network(name, reading):
    torch.manual_seed(0)
    options = dict(layers=(4, 1, 3), channels=(4, 6, 8), num_classes=5, reading=reading)
    net = randomise(timm.create_model("optnet20", algorithm=name, **options).double())
    other = timm.create_model("optnet20", algorithm=FASTER[name](), **options).double()
    other.load_state_dict(net.state_dict(), strict=True)
    assert_same_function(net, other, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    layers = [lambda z: torch.tanh(z)] * 3
    x = torch.randn(2, 4, dtype=torch.float64)
    z, grad = x, lambda z: -torch.tanh(z) if reading == "residual" else z - torch.tanh(z)
    torch.testing.assert_close(Unrolled(FASTER[name](), layers, reading)(x), minimize(FASTER[name](), grad, z, 3)[-1])


@pytest.mark.parametrize("pair", [(1.0, 2.0), (1.0, 0.0), (math.inf, 1.0), (math.nan, 0.5)])
@pytest.mark.parametrize("make", [Chebyshev, TwoStep.triple_momentum])
def test_bad_bounds_are_named(make, pair):
    with pytest.raises(ValueError, match=r"strong_convexity=.*: must obey 0 < strong_convexity ≤ smoothness < inf"):
        make(*pair)


def test_bad_coefficients_are_named():
    for name in ("alpha", "beta", "gamma", "delta"):
        with pytest.raises(ValueError, match=f"{name}=nan: must be finite"):
            TwoStep(**{name: math.nan})
    with pytest.raises(ValueError, match="theta=inf: must be finite"):
        KrasnoselskiiMann(math.inf)
    with pytest.raises(ValueError, match=r"rho=0.5: must be from 0.6838 to 0.9"):
        TwoStep.robust_momentum(0.5)
    with pytest.raises(ValueError, match=r"strong_convexity=1.0: must be < smoothness=1.0"):
        TwoStep.robust_momentum(0.0, 1.0, 1.0)
