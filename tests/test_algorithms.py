"""The algorithms of section 3: two forms agree, substitution gives the networks (11)-(14), rates hold."""

import pytest
import torch

from optinspired_plugins import (
    ALGORITHMS,
    GradientDescent,
    HeavyBall,
    LinearizedADMM,
    Nesterov,
    NesterovSummed,
    constant_momentum,
    heavy_ball,
    minimize,
    momentum,
    nesterov_weights,
)

STEPS = 40
N = 6


def tensor(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quadratic(smallest=0.01):
    """f(z) = z^T H z / 2 with eigenvalues from ``smallest`` to 1: ∇f is 1-Lipschitz."""
    basis = torch.linalg.qr(tensor(N, N)).Q
    hessian = (basis * torch.logspace(torch.tensor(smallest).log10(), 0, N, dtype=torch.float64)) @ basis.T
    return lambda z: z @ hessian


def layer():
    weight = tensor(N, N, seed=3) / N**0.5
    return lambda x: torch.sigmoid(x @ weight)


def as_gradient(T):
    return lambda z: z - T(z)


@pytest.mark.parametrize("steps", [STEPS, 200])
def test_summed_form_is_the_y_sequence_of_the_two_step_form(steps):
    """(4)-(5) gives y_k = z_k + β_k (z_k − z_{k−1}) of (3), past the first coefficient table too."""
    z = minimize(Nesterov(), quadratic(), tensor(N), steps)
    y = z.clone()
    y[1:] += momentum(steps)[:, None] * (z[1:] - z[:-1])
    torch.testing.assert_close(minimize(NesterovSummed(), quadratic(), tensor(N), steps), y, rtol=1e-11, atol=1e-13)


def test_gradient_descent_is_the_feedforward_network_7():
    T, x = layer(), tensor(2, N)
    expected = [x]
    for _ in range(STEPS):
        expected.append(T(expected[-1]))
    torch.testing.assert_close(minimize(GradientDescent(), as_gradient(T), x, STEPS), torch.stack(expected))


def test_heavy_ball_is_network_11():
    T, x = layer(), tensor(2, N)
    expected = heavy_ball([T] * STEPS, x, beta1=0.3, beta2=-0.3)
    torch.testing.assert_close(minimize(HeavyBall(0.3), as_gradient(T), x, STEPS), torch.stack(expected))


def test_nesterov_is_network_12():
    T, x, beta = layer(), tensor(2, N), momentum(STEPS)
    x_prev, xs = x, [x]
    for k in range(STEPS):
        b = beta[k - 1] if k else 0.0
        x, x_prev = T(x + b * (x - x_prev)), x
        xs.append(x)
    torch.testing.assert_close(minimize(Nesterov(), as_gradient(T), xs[0], STEPS), torch.stack(xs))


def test_summed_nesterov_is_network_13():
    T, h, xs = layer(), nesterov_weights(STEPS), [tensor(2, N)]
    for k in range(STEPS):
        transformed = sum(h[k, j] * T(xs[j]) for j in range(k + 1))
        xs.append(transformed + xs[k] - sum(h[k, j] * xs[j] for j in range(k + 1)))
    torch.testing.assert_close(minimize(NesterovSummed(), as_gradient(T), xs[0], STEPS), torch.stack(xs))


def test_admm_is_network_14():
    """λ_0 = 0, x'_0 = x_0, sums over t = 1..k."""
    T, x = layer(), tensor(2, N)
    x1 = x
    total, xs = torch.zeros_like(x), [x]
    for _ in range(STEPS):
        x1_next = (T(x1) + x - total) / 2
        x = (T(x) + x1_next + total) / 2
        x1, total = x1_next, total + x1_next - x
        xs.append(x)
    torch.testing.assert_close(minimize(LinearizedADMM(), as_gradient(T), xs[0], STEPS), torch.stack(xs))


def test_admm_steps_minimise_what_6_says():
    """The closed forms are stationary points of the two subproblems of (6)."""
    f, state = quadratic(), LinearizedADMM().init(tensor(N))
    for _ in range(3):
        state = LinearizedADMM().step(state, f)
    z, y, multiplier = (s.detach() for s in state)
    z_next, y_next, multiplier_next = LinearizedADMM().step(state, f)
    z_free, y_free = z_next.clone().requires_grad_(), y_next.clone().requires_grad_()
    first = f(z) @ z_free + ((z_free - z) ** 2).sum() / 2 + multiplier @ z_free + ((z_free - y) ** 2).sum() / 2
    second = f(y) @ y_free + ((y_free - y) ** 2).sum() / 2 - multiplier @ y_free + ((z_next - y_free) ** 2).sum() / 2
    for objective, variable in ((first, z_free), (second, y_free)):
        assert torch.autograd.grad(objective, variable)[0].abs().max() < 1e-14
    torch.testing.assert_close(multiplier_next, multiplier + z_next - y_next)


def steps_to_accuracy(algorithm, smallest, limit):
    norms = minimize(algorithm, quadratic(smallest), torch.ones(N, dtype=torch.float64), limit).norm(dim=1)
    return int((norms < 1e-6 * norms[0]).nonzero()[0])


@pytest.mark.parametrize("method", [HeavyBall, Nesterov])
def test_accelerated_methods_need_the_square_root_of_the_condition_number(method):
    """Section 3: O(√(L/μ) log 1/ε) steps against O((L/μ) log 1/ε), so a μ 100 times smaller costs 10 times, not 100."""
    accelerated = [steps_to_accuracy(method.strongly_convex(1.0, mu), mu, 2_000) for mu in (1e-1, 1e-3)]
    plain = [steps_to_accuracy(GradientDescent(), mu, 20_000) for mu in (1e-1, 1e-3)]
    assert 5 < accelerated[1] / accelerated[0] < 20
    assert 50 < plain[1] / plain[0] < 200


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_finds_the_minimum_and_forgets_nothing(name):
    algorithm = ALGORITHMS[name]()
    iterates = minimize(algorithm, quadratic(0.3), tensor(4, 3, N), 300)
    assert iterates.shape == (301, 4, 3, N)
    assert iterates[-1].abs().max() < 1e-4
    batched = minimize(algorithm, quadratic(0.3), tensor(4, 3, N)[1, 2], 300)
    torch.testing.assert_close(iterates[:, 1, 2], batched, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_keeps_dtype_and_is_differentiable(name):
    algorithm = ALGORITHMS[name]()
    assert minimize(algorithm, lambda z: 0.5 * z, torch.ones(3, dtype=torch.bfloat16), 3).dtype == torch.bfloat16
    run = lambda x: minimize(algorithm, as_gradient(torch.sigmoid), x, 5)[-1]  # noqa: E731
    assert torch.autograd.gradcheck(run, tensor(2, 3).requires_grad_())


@pytest.mark.parametrize("method", [HeavyBall, Nesterov])
def test_a_momentum_that_is_a_tensor_gets_its_gradient(method):
    beta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    run = lambda b: minimize(method(b), quadratic(), tensor(N), 5)[-1]  # noqa: E731
    assert torch.autograd.gradcheck(run, beta)


def test_any_object_with_the_three_methods_is_an_algorithm():
    class Half:
        def init(self, x0):
            return (x0,)

        def step(self, state, grad):
            return (state[0] - 0.5 * grad(state[0]),)

        def result(self, state):
            return state[0]

    assert minimize(Half(), lambda z: z, torch.ones(1), 2).flatten().tolist() == [1, 0.5, 0.25]


@pytest.mark.parametrize("steps", [-1, 0, 1.0, True])
def test_bad_numbers_of_steps_are_named(steps):
    with pytest.raises(ValueError, match=rf"steps={steps!r}: must be an integer ≥ 1"):
        minimize(GradientDescent(), quadratic(), tensor(N), steps)


def test_constant_momentum_and_its_bounds():
    assert constant_momentum(4.0, 1.0) == pytest.approx(1 / 3)
    assert constant_momentum(1.0, 1.0) == 0
    for pair in ((1.0, 2.0), (1.0, 0.0), (float("inf"), 1.0), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match="must obey 0 < strong_convexity ≤ smoothness"):
            constant_momentum(*pair)


def test_a_gradient_of_another_shape_is_named_with_its_step():
    grad = lambda z: z if z[0] == 1 else z[:2]  # noqa: E731
    with pytest.raises(ValueError, match=r"grad in step 1 maps shape \(3,\) to \(2,\): must keep the shape"):
        minimize(GradientDescent(), grad, torch.ones(3), 4)


def test_what_lacks_a_method_is_no_algorithm():
    class Half:
        def init(self, x0):
            return x0

    with pytest.raises(TypeError, match="has no method step and no method result"):
        minimize(Half(), torch.sin, torch.ones(1), 1)
