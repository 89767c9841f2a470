"""The relaxed rules reduce to the algorithms they come from and to the networks they generalise (Table 3)."""

import pytest
import torch
from torch import nn

from optinspired_plugins import (
    GradientDescent,
    HeavyBall,
    LinearizedADMM,
    Nesterov,
    NesterovSummed,
    TwoPath,
    Unrolled,
    concatenated,
    extrapolated,
    heavy_ball,
    momentum,
    nesterov,
    nesterov_coefficients,
    nesterov_weights,
    two_path,
    weighted_sums,
)
from optinspired_plugins.propagation.probing import layers_per_step

STEPS = 7


def layers(n=STEPS, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5 for _ in range(n)]
    return [lambda x, w=w: torch.sigmoid(x @ w) for w in weights]


def start(width=6):
    return torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def test_rule_16_is_the_heavy_ball_algorithm_2():
    """With β1 = β, β2 = −β and x_{−1} = x_0, (16) is z − ∇f(z) + β(z − z_prev) for ∇f(z) = z − T(z)."""
    beta, x = 0.3, start()
    T = layers(1)[0]
    z_prev = z = x
    expected = [z]
    for _ in range(STEPS):
        gradient = z - T(z)
        z, z_prev = z - gradient + beta * (z - z_prev), z
        expected.append(z)
    torch.testing.assert_close(heavy_ball([T] * STEPS, x, beta1=beta, beta2=-beta), expected)


def test_rule_16_without_its_last_term_is_resnet():
    x, expected = start(), [start()]
    for T in layers():
        expected.append(T(expected[-1]) + expected[-1])
    torch.testing.assert_close(heavy_ball(layers(), x, beta2=0.0), expected, rtol=0, atol=0)


def test_rule_16_takes_a_coefficient_a_step_and_a_start():
    x, x_prev, (T0, T1) = start(), 2 * start(), layers(2)
    b1, b2 = torch.tensor([0.5, 0.7]), torch.tensor([-0.1, 0.2])
    x1 = T0(x) + 0.5 * x - 0.1 * x_prev
    x2 = T1(x1) + 0.7 * x1 + 0.2 * x
    torch.testing.assert_close(heavy_ball([T0, T1], x, x_prev, b1, b2), [x, x1, x2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_rule_16_names_a_wrong_number_of_coefficients(name):
    with pytest.raises(ValueError, match=rf"{name} has 2 values: must be one number or {STEPS}"):
        heavy_ball(layers(), start(), **{name: [0.1, 0.2]})


def test_rule_18_without_beta_is_densenet():
    """α = 1, β = 0: a linear map of the concatenated sources, (19), with the columns of source j in T(j, ·)."""
    width = 6
    weights = [torch.randn(width * (k + 1), width, dtype=torch.float64) for k in range(4)]
    dense = concatenated([lambda x, w=w: x @ w for w in weights], start())
    split = [lambda j, x, w=w: x @ w[j * width : (j + 1) * width] for w in weights]
    ones, zeros = ([f(k + 1, dtype=torch.float64) for k in range(4)] for f in (torch.ones, torch.zeros))
    torch.testing.assert_close(weighted_sums(split, start(), ones, zeros), dense, rtol=1e-12, atol=1e-12)


def test_rule_21_is_equation_13_up_to_its_relaxation():
    """With α = h and β = 1, (21) is (13): the summed Nesterov method with ∇f(x) = x − T(x)."""
    T, h = layers(1)[0], nesterov_weights(STEPS)
    xs = [start()]
    for k in range(STEPS):
        gradients = [x - T(x) for x in xs]
        xs.append(xs[-1] - sum(h[k, j] * gradients[j] for j in range(k + 1)))
    alpha = [h[k, : k + 1] for k in range(STEPS)]
    got = nesterov([lambda j, x: T(x)] * STEPS, start(), alpha, beta=1.0)
    torch.testing.assert_close(got, xs, rtol=1e-12, atol=1e-12)


def test_rule_21_coefficients_sum_to_minus_the_momentum_excess():
    """Row k of β(δ − h) starts with 0 and ends with −β c_k."""
    for k, row in enumerate(nesterov_coefficients(STEPS, beta=0.1)):
        assert row[0] == 0
        assert row[k].item() == pytest.approx(-0.1 * momentum(STEPS)[k].item() if k else 0, abs=1e-15)


def test_rule_21_lets_the_first_source_have_its_own_width():
    narrow = torch.ones(3, 2, dtype=torch.float64)
    T = lambda j, x: x.mean(1, keepdim=True).expand(-1, 6)  # noqa: E731
    zs = nesterov([T, T, T], narrow, [torch.ones(k + 1) for k in range(3)])
    assert [z.shape[1] for z in zs] == [2, 6, 6, 6]


def test_finish_acts_on_the_sum_of_the_transforms_alone():
    alpha, beta = [torch.tensor([2.0])], [torch.tensor([3.0])]
    (_, x1) = weighted_sums([lambda j, x: x], torch.ones(1), alpha, beta, finish=[lambda s: -s])
    assert x1.item() == -2 + 3


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_rule_18_names_rows_of_a_wrong_length(name):
    rows = {"alpha": [torch.ones(1), torch.ones(2)], "beta": [torch.ones(1), torch.ones(2)]}
    rows[name] = [torch.ones(1), torch.ones(1)]
    with pytest.raises(ValueError, match=rf"{name} has rows of \[1, 1\] coefficients: must be \[1, 2\]"):
        weighted_sums([lambda j, x: x] * 2, torch.ones(1), **rows)


def test_rules_are_differentiable_in_their_coefficients():
    beta1 = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    beta2 = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    run = lambda b1, b2: heavy_ball(layers(3), start(), beta1=b1, beta2=b2)[-1]  # noqa: E731
    assert torch.autograd.gradcheck(run, (beta1, beta2))


def test_rule_17_with_nesterovs_momentum_is_network_12():
    beta = torch.cat([torch.zeros(1), momentum(STEPS - 1)])
    got = extrapolated(layers(), start(), beta1=1 + beta, beta2=-beta)
    torch.testing.assert_close(got[-1], Unrolled(Nesterov(), layers())(start()), rtol=1e-12, atol=1e-12)


def test_rule_17_without_its_last_term_is_a_plain_network():
    torch.testing.assert_close(extrapolated(layers(), start())[-1], Unrolled(GradientDescent(), layers())(start()))


def test_rule_19_concatenates_every_source():
    zs = concatenated([lambda z: z.sum(1, keepdim=True)] * 3, torch.ones(1, 2))
    assert [z.flatten().tolist() for z in zs] == [[1, 1], [2], [4], [8]]


def test_rule_20_with_halves_is_dmrnet():
    pairs = list(zip(layers(seed=1), layers(seed=2)))
    x1 = x2 = start()
    for k, (T1, T2) in enumerate(pairs):
        mean = (x1 + x2) / 2
        x1, x2 = T1(x1) + mean, T2(x2) + mean
        got = two_path(pairs[: k + 1], start())[-1]
        torch.testing.assert_close(got, (x1, x2), rtol=1e-12, atol=1e-12)


def test_rule_20_sums_the_states_after_the_start():
    identity = (lambda x: 0 * x, lambda x: 0 * x)
    alpha = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0, 5.0])]
    beta = [torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0, 0.0])]
    pairs = two_path([identity] * 3, torch.ones(1), alpha, beta)
    assert [p[0].item() for p in pairs] == [1, 1, 2, 3 * 1 + 5 * 2]
    with pytest.raises(ValueError, match=r"beta has rows of \[1, 2, 3\] coefficients: must be \[1, 1, 2\]"):
        two_path([identity] * 3, torch.ones(1), alpha, [torch.ones(k) for k in (1, 2, 3)])


def test_the_two_forms_of_rule_20_differ_by_the_start_in_the_first_step():
    pairs, a, b = list(zip(layers(seed=1), layers(seed=2))), 0.2, 0.7
    newest = [torch.eye(max(k, 1), dtype=torch.float64)[-1] for k in range(len(pairs))]
    rule = two_path(pairs, start(), [a * row for row in newest], [b * row for row in newest])[-1]
    first = [lambda x, T=T: T(x) + (a + b) * x for T in pairs[0]]
    algorithm = Unrolled(TwoPath(a, b), [first, *pairs[1:]])(start())
    torch.testing.assert_close(algorithm, (rule[0] + rule[1]) / 2, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(Unrolled(TwoPath(a, b), pairs)(start()), algorithm)


# --- Unrolled ---------------------------------------------------------------------------------------------------------


def modules(n=5, width=6):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(width, width), nn.Sigmoid()).double() for _ in range(n)]


def test_unrolled_gradient_descent_is_a_sequential_network():
    net = modules()
    x = start()
    torch.testing.assert_close(Unrolled(GradientDescent(), net)(x), nn.Sequential(*net)(x), rtol=1e-12, atol=1e-12)


def test_unrolled_heavy_ball_is_rule_16_with_opposite_coefficients():
    net, x = modules(), start()
    expected = heavy_ball(net, x, beta1=0.3, beta2=-0.3)[-1]
    torch.testing.assert_close(Unrolled(HeavyBall(0.3), net)(x), expected, rtol=1e-12, atol=1e-12)


def test_unrolled_nesterov_is_12_with_a_layer_a_step():
    net, x, beta = modules(), start(), momentum(5)
    expected, prev = x, x
    for k, T in enumerate(net):
        b = beta[k - 1] if k else 0.0
        expected, prev = T(expected + b * (expected - prev)), expected
    torch.testing.assert_close(Unrolled(Nesterov(), net)(x), expected, rtol=1e-12, atol=1e-12)


def test_unrolled_summed_nesterov_gives_each_source_its_own_layer():
    """(13) with a weight a layer: W_j belongs to the source x_j."""
    net, xs, h = modules(), [start()], nesterov_weights(5)
    for k in range(5):
        xs.append(xs[k] + sum(h[k, j] * (net[j](xs[j]) - xs[j]) for j in range(k + 1)))
    torch.testing.assert_close(Unrolled(NesterovSummed(), net)(xs[0]), xs[-1], rtol=1e-12, atol=1e-12)


def test_unrolled_admm_has_two_paths_with_their_own_layers():
    first, second, x = modules(), modules()[::-1], start()
    x1, total, expected = x, 0.0, x
    for T1, T in zip(first, second):
        x1_next = (T1(x1) + expected - total) / 2
        expected = (T(expected) + x1_next + total) / 2
        x1, total = x1_next, total + x1_next - expected
    net = Unrolled(LinearizedADMM(), list(zip(first, second)))
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert len(list(net.parameters())) == 2 * len(list(nn.ModuleList(first).parameters()))


def test_unrolled_learns_its_layers_and_a_modules_coefficients():
    class Learned(nn.Module, HeavyBall):
        def __init__(self):
            nn.Module.__init__(self)
            self.beta = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    net = Unrolled(Learned(), modules())
    net(start()).square().sum().backward()
    assert len(list(net.parameters())) == 11
    assert all((p.grad != 0).any() for p in net.parameters())


def test_unrolled_refuses_what_cannot_be_called_and_too_few_paths():
    with pytest.raises(TypeError, match=r"transforms\[1\] is a int: must be callable"):
        Unrolled(GradientDescent(), [torch.sigmoid, 3])
    with pytest.raises(ValueError, match=r"transforms\[0\] has 1 transforms: the algorithm asks for more gradients"):
        Unrolled(LinearizedADMM(), [[torch.sigmoid]])(start())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_coefficients_that_are_not_finite_are_named(bad):
    for rule in (heavy_ball, extrapolated):
        with pytest.raises(ValueError, match=r"beta1=.*(nan|inf).*: must be finite"):
            rule([torch.clone], torch.ones(1), beta1=bad)
        with pytest.raises(ValueError, match=r"beta2\[1\]=.*(nan|inf).*: must be finite"):
            rule([torch.clone] * 2, torch.ones(1), beta2=[0.0, bad])
    with pytest.raises(ValueError, match=r"alpha\[0\]=.*(nan|inf).*: must be finite"):
        weighted_sums([lambda j, z: z], torch.ones(1), [torch.tensor([float(bad)])], [torch.ones(1)])
    for method in (HeavyBall, Nesterov, TwoPath):
        with pytest.raises(ValueError, match=r"=.*(nan|inf).*: must be finite"):
            method(bad)


def test_unrolled_names_a_layer_that_changes_the_shape():
    net = Unrolled(HeavyBall(), [nn.Linear(4, 4), nn.Linear(4, 3)])
    with pytest.raises(ValueError, match=r"transforms\[1\] maps shape \(2, 4\) to \(2, 3\): must keep the shape"):
        net(torch.ones(2, 4))
    net = Unrolled(LinearizedADMM(), [[torch.clone, nn.Linear(4, 1)]])
    with pytest.raises(ValueError, match=r"transforms\[0\] maps shape \(2, 4\) to \(2, 1\)"):
        net(torch.ones(2, 4))


def test_unrolled_refuses_no_layers_and_no_algorithm():
    with pytest.raises(ValueError, match="transforms is empty: must hold at least one"):
        Unrolled(HeavyBall(), [])
    with pytest.raises(TypeError, match="algorithm=HeavyBall is a class: must be an object"):
        Unrolled(HeavyBall, [torch.clone])


def test_unrolled_learns_a_parameter_that_a_plain_algorithm_holds():
    net = Unrolled(HeavyBall(nn.Parameter(torch.tensor(0.3, dtype=torch.float64))), modules())
    net(start()).square().sum().backward()
    assert net.algorithm.beta.grad.item() != 0
    assert "algorithm.beta" in net.state_dict()


def test_the_count_of_layers_is_the_count_of_gradients():
    assert layers_per_step(HeavyBall(), 3) == (1, 1, 1)
    assert layers_per_step(LinearizedADMM(), 2) == (2, 2)
    with pytest.raises(ValueError, match="steps=0: must be an integer ≥ 1"):
        layers_per_step(HeavyBall(), 0)
