"""Lemma 1 and Table 1: value, gradient and continuity for all eight activations, and propagation as descent."""

import numpy as np
import pytest
import torch
from extras import needs

from optinspired_plugins import ACTIVATIONS, GradientDescent, Objective, minimize
from optinspired_plugins.algorithms.objectives import dilogarithm_of_minus_exp, elu, leaky_relu, softplus

every_activation = pytest.mark.parametrize("name", ACTIVATIONS)
WIDE = torch.linspace(-30, 30, 1201, dtype=torch.float64)


def weight(n=5, seed=0):
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


def points(n=5, count=7):
    return torch.randn(count, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_activation
def test_psi_has_the_derivative_phi_on_the_whole_line(name):
    u = WIDE[WIDE != 0].clone().requires_grad_()
    phi, psi = ACTIVATIONS[name]
    (derivative,) = torch.autograd.grad(psi(u).sum(), u)
    torch.testing.assert_close(derivative, phi(u), rtol=1e-12, atol=1e-13)


@every_activation
def test_psi_integrates_phi(name):
    """Values, not only derivatives: Ψ(b) − Ψ(a) is the integral of Φ, across 0 too (Gauss-Legendre)."""
    phi, psi = ACTIVATIONS[name]
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(200))
    total = 0.0
    for a, b in ((-3.0, 0.0), (0.0, 2.0)):
        total += (phi((a + b) / 2 + (b - a) / 2 * nodes) * weights).sum() * (b - a) / 2
    difference = psi(torch.tensor(2.0, dtype=torch.float64)) - psi(torch.tensor(-3.0, dtype=torch.float64))
    torch.testing.assert_close(difference, total, rtol=1e-10, atol=1e-10)


@every_activation
def test_psi_is_continuous_at_0(name):
    left, right = torch.tensor([-1e-9, 1e-9], dtype=torch.float64)
    psi = ACTIVATIONS[name].psi
    assert abs(psi(left) - psi(right)) < 1e-8


@every_activation
def test_gradient_9_is_the_gradient_of_8(name):
    objective, z = Objective(name, weight()), points().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.value(z).sum(), z)
    torch.testing.assert_close(objective.grad(z), gradient, rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(objective.value, z)


@every_activation
def test_propagation_is_gradient_descent_in_another_variable(name):
    """Lemma 1: x_{k+1} = Φ(W x_k) and (1) on f(U x) give the same sequence."""
    w, x = weight() / 4, points()
    objective = Objective(name, w)
    z = minimize(GradientDescent(), objective.grad, x @ objective.root, 10)
    for k in range(11):
        torch.testing.assert_close(z[k], x @ objective.root, rtol=1e-9, atol=1e-10)
        x = ACTIVATIONS[name].phi(x @ w)


def test_printed_rows_are_corrected():
    """The printed ELU jumps by a at 0, the printed softsign has the logarithm of a negative number for u ≤ 0."""
    psi = ACTIVATIONS["elu"].psi
    assert psi(torch.zeros((), dtype=torch.float64)) == 0
    u = torch.tensor(-2.0, dtype=torch.float64)
    assert ACTIVATIONS["softsign"].psi(u).item() == pytest.approx(2 - torch.log(torch.tensor(3.0)).item(), rel=1e-6)
    assert ACTIVATIONS["tanh"].psi(u).item() == pytest.approx(
        torch.cosh(u).log().item() + torch.log(torch.tensor(2.0)).item(), rel=1e-6
    )


def test_parameters_of_activations():
    u = WIDE[WIDE != 0].clone().requires_grad_()
    for activation in (leaky_relu(0.3), elu(1.7)):
        (derivative,) = torch.autograd.grad(activation.psi(u).sum(), u)
        torch.testing.assert_close(derivative, activation.phi(u), rtol=1e-12, atol=1e-13)


def test_dilogarithm_agrees_with_scipy_from_end_to_end():
    needs("scipy")
    from scipy import special

    u = torch.linspace(-60, 60, 4001, dtype=torch.float64)
    expected = torch.from_numpy(special.spence(1 + u.exp().numpy()))
    torch.testing.assert_close(dilogarithm_of_minus_exp(u), expected, rtol=1e-13, atol=1e-15)
    assert dilogarithm_of_minus_exp(torch.zeros(())).item() == pytest.approx(-(torch.pi**2) / 12)
    assert dilogarithm_of_minus_exp(torch.tensor([-800.0, 800.0])).isfinite().all()


def test_dilogarithm_and_softplus_are_differentiable_everywhere():
    u = torch.cat([WIDE, torch.zeros(1)]).requires_grad_()  # some processors' linspace misses 0
    (derivative,) = torch.autograd.grad(dilogarithm_of_minus_exp(u).sum(), u)
    torch.testing.assert_close(derivative, -softplus(u), rtol=1e-12, atol=1e-14)


def test_the_root_is_a_root():
    root = Objective("relu", weight()).root
    torch.testing.assert_close(root @ root, weight())
    torch.testing.assert_close(root, root.T)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(2, 3), r"weight of shape \(2, 3\): must be a square matrix"),
        (torch.ones(4), r"weight of shape \(4,\): must be a square matrix"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), r"weight differs from its transpose by 5.00e-01: must be symmetric"),
        (torch.diag(torch.tensor([1.0, -0.5])), r"eigenvalue -5.00e-01: must be positive definite"),
        (torch.diag(torch.tensor([1.0, 0.0])), r"eigenvalue 0.00e\+00: must be positive definite"),
        (torch.full((2, 2), float("nan")), r"not finite"),
    ],
)
def test_a_matrix_without_a_root_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Objective("relu", bad)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"activation='gelu': must be one of sigmoid, tanh"):
        Objective("gelu", weight())
