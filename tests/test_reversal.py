"""The reversible heavy-ball rule equals the plain rule, and the errors of recovered iterates are small."""

import functools

import pytest
import torch
from torch import nn

from optinspired_plugins.memory.heavy_ball import SplitTransform, error_growth, reversible_heavy_ball
from optinspired_plugins.propagation.rules import heavy_ball


class Affine(nn.Module):
    """A transform of two parts on vectors."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = (nn.Parameter(torch.randn(3, 3, generator=generator).double() / 2) for _ in range(2))

    def first(self, x):
        return torch.tanh(x @ self.a)

    def second(self, y):
        return torch.sin(y) @ self.b

    def forward(self, x):
        return self.second(self.first(x))

    def parts(self, reversible):
        return SplitTransform(self, None, [self]) if reversible else SplitTransform(self, self.first, [self.second])


def rule(reversible, x0, x1, *betas):
    transforms = [Affine(seed) for seed in range(len(betas) // 2)]
    half = len(betas) // 2
    return reversible_heavy_ball([T.parts(reversible) for T in transforms], x0, x1, betas[:half], betas[half:])


@pytest.mark.parametrize("reversible", [False, True])
def test_gradcheck(reversible):
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(2, 3, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    betas = [torch.tensor(b, dtype=torch.float64, requires_grad=True) for b in (1.1, 0.8, 0.9, -0.9, -1.2, 0.7)]
    assert torch.autograd.gradcheck(functools.partial(rule, reversible), (x0, x1, *betas))


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("betas", [(1.0, -1.0), (0.7, 0.4), (0.0, -1.0), (-1.3, 2.0)])
def test_it_is_the_plain_rule(betas, reversible):
    """x_1 of the rule is its first step, where x_{−1} = x_0."""
    transforms = [Affine(seed) for seed in range(5)]
    parameters = [p for T in transforms for p in T.parameters()]
    x0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    plain = heavy_ball(transforms, x0, beta1=betas[0], beta2=betas[1])[-1]
    x1 = transforms[0](x0) + sum(betas) * x0
    recovered = reversible_heavy_ball(
        [T.parts(reversible) for T in transforms[1:]], x0, x1, [betas[0]] * 4, [betas[1]] * 4
    )
    torch.testing.assert_close(recovered, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), [x0, *parameters]) for y in (recovered, plain))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_coefficient_that_is_zero_is_refused():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"beta2=0 in step 2: must not be 0"):
        rule(True, x, x, 1.0, 1.0, -1.0, torch.zeros(()))


def test_a_second_derivative_is_refused():
    """Where the first one is taken: an error in its graph could be cut off by ``inputs=``."""
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True: a heavy-ball stage .* has no second derivative"):
        torch.autograd.grad(rule(False, x, x, 1.0, -1.0).sum(), x, create_graph=True)


def test_error_growth_is_the_growth_of_the_recursion():
    """(1, −1) has period 6 and never grows; two steps of β2 = −1/2 and β1 = 0 quadruple; β2 = 0 undoes nothing."""
    assert error_growth([1.0] * 40, [-1.0] * 40) == 1
    assert error_growth([0.0] * 4, [-0.5] * 4) == 4
    assert error_growth([2.0] * 5, [-1.0] * 5) == 6
    assert error_growth([0.0] * 3, [-1.0, -0.1, -1.0]) == pytest.approx(10), "from whichever step it is largest"
    assert error_growth([1.0], [0.0]) == float("inf")
    assert error_growth([], []) == 1


@pytest.mark.parametrize(("depth", "limit"), [(8, 1e-6), (64, 1e-5)])
def test_errors_of_recovered_iterates_are_small(depth, limit):
    """The relative error of the input of T_1 in the backward pass, in float32."""
    torch.manual_seed(0)
    seen = []

    def layer():
        linear = nn.Linear(16, 16)
        return nn.Sequential(nn.BatchNorm1d(16), nn.ReLU(), linear)

    transforms = [layer() for _ in range(depth)]
    transforms[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    x = torch.randn(32, 16, requires_grad=True)
    betas = [1.0] * depth, [-1.0] * depth
    reversible_heavy_ball([SplitTransform(T, None, [T]) for T in transforms], x, 2 * x, *betas).sum().backward()
    first, repeated = seen
    assert 0 < ((first - repeated).norm() / first.norm()).item() < limit
