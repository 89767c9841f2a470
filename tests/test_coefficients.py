"""The coefficients obey the paper's recursions (3) and (5), and the closed forms that the models rely on."""

import pytest
import torch

from optinspired_plugins import momentum, nesterov_weights, theta

N = 40


def test_theta_solves_its_quadratic():
    t = theta(N)
    assert t.shape == (N + 1,)
    assert t.dtype == torch.float64
    assert t[0] == 1
    torch.testing.assert_close((1 - t[1:]) / t[1:] ** 2, 1 / t[:-1] ** 2, rtol=1e-13, atol=0)
    assert (t.diff() < 0).all()


def test_theta_1_is_the_golden_ratio():
    assert theta(1)[1].item() == pytest.approx((5**0.5 - 1) / 2, rel=1e-15)


def test_momentum_is_the_factor_of_equation_12():
    t, beta = theta(N), momentum(N)
    expected = [t[k] * (1 - t[k - 1]) / t[k - 1] for k in range(1, N + 1)]
    torch.testing.assert_close(beta, torch.stack(expected), rtol=0, atol=0)
    assert beta[0] == 0
    assert (beta.diff() > 0).all()
    assert momentum(10_000)[-1] > 0.999


def test_weights_follow_recursion_5_entry_by_entry():
    t, h = theta(N), nesterov_weights(N)
    assert h[0, 0] == 1
    for k in range(1, N):  # row k holds h_{k+1, ·}
        c = t[k + 1] * (1 - t[k]) / t[k]
        for j in range(k - 1):
            assert h[k, j].item() == pytest.approx((c * h[k - 1, j]).item(), rel=1e-14)
        assert h[k, k - 1].item() == pytest.approx((c * (h[k - 1, k - 1] - 1)).item(), abs=1e-14)
        assert h[k, k].item() == pytest.approx((1 + c).item(), rel=1e-14)
    assert torch.equal(h, h.tril())


def test_first_source_leaves_every_later_sum():
    h = nesterov_weights(N)
    assert h[0, 0] == 1
    assert (h[1:, 0] == 0).all()


def test_summed_form_4_gives_the_iterates_of_3():
    """y_k of (3) and y_k of (4)-(5) agree for 40 steps on a quadratic."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    hessian = a @ a.T / (a @ a.T).norm()
    start = torch.randn(8, generator=generator, dtype=torch.float64)
    beta, h = momentum(N), nesterov_weights(N)

    z_prev = z = start
    two_step = []
    for k in range(N):
        y = z + (beta[k - 1] if k else 0) * (z - z_prev)
        two_step.append(y)
        z, z_prev = y - hessian @ y, z

    summed = [start]
    for k in range(N - 1):
        gradients = torch.stack([hessian @ y for y in summed])
        summed.append(summed[-1] - h[k, : k + 1] @ gradients)
    torch.testing.assert_close(torch.stack(summed), torch.stack(two_step), rtol=1e-13, atol=1e-14)


def test_the_h_term_is_a_first_order_recursion():
    """m_{k+1} = z_k − Σ_j h_{k+1,j} z_j obeys m_1 = 0, m_{k+1} = c_k (m_k − z_k)."""
    z = torch.randn(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h, c = nesterov_weights(N), momentum(N)
    m = z[0] - h[0, 0] * z[0]
    assert (m == 0).all()
    for k in range(1, N):
        m = c[k] * (m - z[k])
        torch.testing.assert_close(m, z[k] - h[k, : k + 1] @ z[: k + 1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("function", [theta, momentum, nesterov_weights])
@pytest.mark.parametrize("n", [-1, 1.5, "3", True])
def test_bad_counts_are_named(function, n):
    with pytest.raises(ValueError, match=r"n=.*must be an integer ≥ 0"):
        function(n)


def test_coefficients_ignore_the_default_device_and_dtype():
    with torch.device("meta"):
        assert theta(3).device.type == momentum(3).device.type == nesterov_weights(3).device.type == "cpu"
