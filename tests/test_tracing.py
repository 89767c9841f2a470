"""Programs traced from an algorithm compute the same as the algorithm."""

from typing import NamedTuple

import pytest
import torch
from my_algorithms import LearnedHeavyBall, OptimizedGradient

from optinspired_plugins import ALGORITHMS, HeavyBall, NesterovSummed, TwoPath, Unrolled, nesterov_weights, trace
from optinspired_plugins.propagation.tracing import Call, NotLinearError, Sum, Term

STEPS = 12
EVERY = {**ALGORITHMS, "dmrnet": TwoPath, "ogm": OptimizedGradient}


def layers(count):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count, 4, 4, dtype=torch.float64, generator=generator)
    return [lambda z, w=w: torch.tanh(z @ w) for w in weights]


def execute(program, transforms, x, u=None):
    """Run a program in its plainest form."""
    registers, transforms = [x], iter(transforms)
    for instruction in program.instructions:
        if isinstance(instruction, Call):
            point = u if instruction.register == -1 else registers[instruction.register]
            registers.append(next(transforms)(point))
        else:
            registers.append(sum(weight * registers[register] for register, weight in instruction.terms))
    return registers[program.result]


@pytest.mark.parametrize("name", EVERY)
def test_a_program_computes_what_the_algorithm_computes(name):
    algorithm = EVERY[name]()
    program = trace(algorithm, STEPS)
    T, x = layers(sum(program.calls)), torch.randn(3, 4, dtype=torch.float64)
    calls = iter(T)
    groups = [[next(calls) for _ in range(count)] for count in program.calls]
    torch.testing.assert_close(execute(program, T, x), Unrolled(algorithm, groups)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_a_transition_is_a_residual_layer_of_another_tensor(name):
    """∇f(x_0) = −T_0(u): the first layer is T_0(u) + x_0."""
    program = trace(EVERY[name](), STEPS, transition=True)
    first = program.calls[0]
    T, x, u = layers(sum(program.calls)), torch.randn(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    residual = [lambda z, t=t: t(u) + z for t in T[:first]]
    calls = iter(residual + T[first:])
    groups = [[next(calls) for _ in range(count)] for count in program.calls]
    expected = Unrolled(EVERY[name](), groups)(x)
    torch.testing.assert_close(execute(program, T, x, u), expected, rtol=1e-12, atol=1e-12)


def test_gradient_descent_comes_down_to_its_layers():
    """A gradient step is z − (z − T(z)) = T(z): nothing but calls is left of (7)."""
    assert trace(ALGORITHMS["gd"](), 3).instructions == (Call(0, 0, 0), Call(1, 0, 1), Call(2, 0, 2))


def test_heavy_ball_comes_down_to_11():
    instructions = trace(HeavyBall(0.3), 3).instructions
    sums = [i for i in instructions if isinstance(i, Sum)]
    assert sums[0] == Sum(2, "z", (Term(2, 1.0), Term(1, 0.3), Term(0, -0.3)))  # x_2 = T(x_1) + β x_1 − β x_0
    assert [t.weight for t in sums[1].terms] == [1.0, 0.3, -0.3]
    assert len(instructions) == 5


def test_summed_nesterov_comes_down_to_13():
    """Layers have the weights h_{k+1,j}, iterates the weights −h_{k+1,j}, and 1 − h_{k+1,k} for the newest."""
    program, h = trace(NesterovSummed(), 5), nesterov_weights(5)
    last = program.instructions[program.result - 1]
    weights = dict(last.terms)
    calls = [i for i, instruction in enumerate(program.instructions, start=1) if isinstance(instruction, Call)]
    assert weights[calls[4]] == pytest.approx(h[4, 4].item())
    # T(y_0) is y_1 itself, so its two weights are one.
    points = [program.instructions[c - 1].register for c in calls]
    assert weights[calls[3]] == pytest.approx(h[4, 3].item())
    assert weights[points[4]] == pytest.approx(1 - h[4, 4].item())
    assert weights[points[3]] == pytest.approx(-h[4, 3].item())


def test_admm_comes_down_to_14_without_its_last_multiplier():
    program = trace(ALGORITHMS["admm"](), 3)
    assert program.calls == (2, 2, 2)
    sums = [(i.step, i.name) for i in program.instructions if isinstance(i, Sum)]
    assert sums == [(k, n) for k in (1, 2, 3) for n in ("z", "y", "multiplier")][:-1]


class Base:
    def init(self, x0):
        return (x0, x0)

    def result(self, state):
        return state[0]


class Spelt(Base):
    """The heavy ball with β = ½ in torch's functions and in place of operators."""

    def step(self, state, grad):
        z, z_prev = state
        moved = torch.add(torch.mul(z, 1), torch.neg(grad(z)))
        return (torch.add(moved, torch.sub(z, z_prev), alpha=0.5), z.clone())


class Mapping(Base):
    """Keeps its state in a dictionary."""

    def init(self, x0):
        return {"z": x0, "more": [x0]}

    def step(self, state, grad):
        z, z_prev = state["z"], state["more"][0]
        return {"z": sum([z, -grad(z), (z - z_prev) / 2]), "more": [z]}

    def result(self, state):
        return state["z"]


@pytest.mark.parametrize("spelling", [Spelt, Mapping])
def test_other_spellings_come_down_to_the_same(spelling):
    got, expected = trace(spelling(), 4), trace(HeavyBall(0.5), 4)
    strip = lambda p: [i._replace(name="") if isinstance(i, Sum) else i for i in p.instructions]  # noqa: E731
    assert strip(got) == strip(expected)


def refused(body):
    return type("Refused", (Base,), {"step": body})()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda self, s, g: (s[0] - g(s[0]) / g(s[0]).norm(), s[0]), r"uses \.norm of an iterate"),
        (lambda self, s, g: (s[0] - torch.sign(g(s[0])), s[0]), "calls sign on an iterate"),
        (lambda self, s, g: (s[0] - g(s[0]) * torch.tensor(0.5), s[0]), "by a Tensor, not by a number"),
        (lambda self, s, g: (s[0] - torch.tensor(0.5) * g(s[0]), s[0]), "by a Tensor, not by a number"),
        (lambda self, s, g: (s[0] - g(s[0]) * s[0], s[0]), "not by a number"),
        (lambda self, s, g: (s[0] - g(s[0]) + 1, s[0]), "adds 1 to an iterate"),
        (lambda self, s, g: (s[0] if g(s[0]) else s[1], s[0]), "decides by an iterate's value"),
        (lambda self, s, g: (g(s[0] - s[0]), s[0]), "is 0 for every input"),
    ],
)
def test_what_is_not_linear_is_refused_and_never_misread(body, message):
    with pytest.raises(NotLinearError, match=message):
        trace(refused(body), 2)


def test_a_learned_coefficient_is_not_a_number():
    with pytest.raises(NotLinearError, match="by a Parameter"):
        trace(LearnedHeavyBall(), 3)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="steps=0: must be an integer ≥ 1"):
        trace(HeavyBall(), 0)
    with pytest.raises(ValueError, match="step 0 of Refused asks for no gradient"):
        trace(refused(lambda self, s, g: s), 2)
    with pytest.raises(TypeError, match="has no method step"):
        trace(Base(), 2)


def test_a_stored_gradient_costs_no_register():
    class State(NamedTuple):
        z: object
        gradients: tuple

    class Averaged:
        """Steps along the mean of all gradients so far."""

        def init(self, x0):
            return State(x0, ())

        def step(self, state, grad):
            gradients = (*state.gradients, grad(state.z))
            return State(state.z - sum(gradients) / len(gradients), gradients)

        def result(self, state):
            return state.z

    assert {i.name for i in trace(Averaged(), 4).instructions if isinstance(i, Sum)} == {"z"}


def test_a_layer_whose_output_reaches_no_result_stays():
    """Each layer belongs to a call: without this one, all later layers would move by one call."""

    class Watched(Base):
        def step(self, state, grad):
            grad(state[0] / 2)
            return (state[0] - grad(state[0]), state[0])

    program = trace(Watched(), 3)
    assert [i.path for i in program.instructions if isinstance(i, Call)] == [0, 1] * 3 == [0, 1, 0, 1, 0, 1]
    T, x = layers(6), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(execute(program, T, x), T[5](T[3](T[1](x))), rtol=0, atol=0)
