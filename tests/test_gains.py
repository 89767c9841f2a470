"""The weights of inputs and layers in the result of a program, and the variance that they predict."""

import math
import re
from pathlib import Path

import pytest
import torch
from my_algorithms import LearnedHeavyBall, OptimizedGradient

from optinspired_plugins import ALGORITHMS, HeavyBall, Nesterov, TwoPath, Unrolled, momentum, trace
from optinspired_plugins.propagation.tracing import NotLinearError, Sum, trace_at_present

DEPTHS = [1, 2, 3, 9, 18, 36]
EVERY = {**ALGORITHMS, "hb1": lambda: HeavyBall(1.0), "dmrnet": TwoPath, "ogm": OptimizedGradient}


def gains(algorithm, steps):
    return torch.tensor(trace(algorithm, steps, transition=True).gains(), dtype=torch.float64)


def unroll(algorithm, outputs, x0):
    """Run an algorithm with layers that ignore their input; the first step's are residual."""
    count = paths(algorithm)
    layers = [lambda z, k=k, t=t: t + z if k < count else t for k, t in enumerate(outputs)]
    return Unrolled(algorithm, [layers[k : k + count] for k in range(0, len(layers), count)])(x0)


def paths(algorithm):
    """The number of layers of a step."""
    return trace(algorithm, 1).calls[0]


@pytest.mark.parametrize("steps", DEPTHS)
@pytest.mark.parametrize("name", EVERY)
def test_gains_are_what_constant_layers_show(name, steps):
    """With x_0 and the layers' outputs the unit vectors, the result holds the weights themselves."""
    algorithm = EVERY[name]()
    unit = torch.eye(1 + steps * paths(algorithm), dtype=torch.float64)
    expected = unroll(algorithm, unit[1:], unit[0])
    torch.testing.assert_close(gains(algorithm, steps), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", DEPTHS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, -0.5])
def test_heavy_ball_has_the_weights_of_its_recurrence(beta, steps):
    """w_j = g_{n−1−j} with g_0 = 1, g_{i+1} = β g_i − β g_{i−1}."""
    g = [1.0, beta]
    while len(g) < steps:
        g.append(beta * g[-1] - beta * g[-2])
    expected = torch.tensor(g[:steps][::-1], dtype=torch.float64)
    torch.testing.assert_close(gains(HeavyBall(beta), steps)[1:], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", range(1, 40))
def test_heavy_ball_with_beta_1_has_the_squared_weight_n_minus_a_third(steps):
    """The weights are 1, 1, 0, −1, −1, 0, …: Σ w² = n − ⌊n/3⌋, and the input has none for n = 2, 5, 8, …."""
    x0, *calls = gains(HeavyBall(1.0), steps).tolist()
    assert sum(w * w for w in calls) == steps - steps // 3
    assert (x0 == 0) == (steps % 3 == 2)
    assert abs(x0) in (0, 1)


@pytest.mark.parametrize("name", ["gd", "agd"])
def test_gradient_descent_and_nesterov_return_their_last_layer(name):
    """z_{k+1} = T(y_k): after the transition, nothing else reaches the result."""
    assert gains(ALGORITHMS[name](), 1).tolist() == [1, 1]
    for steps in DEPTHS[1:]:
        assert gains(ALGORITHMS[name](), steps).tolist() == [0] * steps + [1]


@pytest.mark.parametrize("steps", [3, 9, 36])
def test_summed_nesterov_returns_the_extrapolated_last_layers(steps):
    """y_n = (1 + β_n) T_{n−1} − β_n T_{n−2}."""
    beta = momentum(steps)[steps - 1].item()
    expected = torch.zeros(steps + 1, dtype=torch.float64)
    expected[-2:] = torch.tensor([-beta, 1 + beta], dtype=torch.float64)
    torch.testing.assert_close(gains(ALGORITHMS["agd2"](), steps), expected, rtol=1e-9, atol=1e-9)


def test_admm_weights_its_first_layers():
    """y_1 = ½ (x_0 + T_0) + ½ z_1 and z_1 = x_0 + ½ T'_0, where ∇f(x_0) = −T(u)."""
    assert gains(ALGORITHMS["admm"](), 1).tolist() == [1, 0.25, 0.5]


@pytest.mark.parametrize("steps", [3, 18])
@pytest.mark.parametrize("name", EVERY)
def test_random_layers_have_the_predicted_variance(name, steps):
    """Var(result) = h² Var(x_0) + Σ_j w_j² γ² for independent layers of variance γ²."""
    algorithm, gamma, samples = EVERY[name](), 0.4, 40_000
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(1 + steps * paths(algorithm), samples, dtype=torch.float64, generator=generator)
    result = unroll(algorithm, gamma * draws[1:], 2 * draws[0])
    h, *w = gains(algorithm, steps).tolist()
    predicted = 4 * h**2 + gamma**2 * math.fsum(x * x for x in w)
    assert result.var().item() == pytest.approx(predicted, rel=5 * (2 / samples) ** 0.5)


def test_every_register_has_its_weights():
    """Those of a sum are its terms', and those of a call its own."""
    program = trace(Nesterov(0.5), 4, transition=True)
    weights = program.weights()
    assert len(weights) == len(program.instructions) + 1
    assert weights[0] == (1, 0, 0, 0, 0)
    for instruction, row in zip(program.instructions, weights[1:]):
        if isinstance(instruction, Sum):
            terms = [[weight * x for x in weights[register]] for register, weight in instruction.terms]
            assert row == pytest.approx([sum(column) for column in zip(*terms)])
        else:
            assert sorted(row) == [0, 0, 0, 0, 1]
            assert row[1 + instruction.step] == 1


def test_learned_coefficients_count_with_their_present_values():
    learned = LearnedHeavyBall(0.5)
    assert trace_at_present(learned, 9, transition=True).gains() == tuple(gains(HeavyBall(0.5), 9).tolist())
    with pytest.raises(NotLinearError, match="by a Parameter"):
        trace(learned, 9)


def test_the_table_of_the_documentation_is_computed():
    text = (Path(__file__).parents[1] / "docs" / "theory.md").read_text(encoding="utf-8")
    text = text.partition("## The start")[2].partition("## ")[0]
    rows = {"heavy ball": "hb1", "gradient": "gd", "Nesterov (": "agd", "Nesterov,": "agd2", "linearised": "admm"}
    for title, name in {**rows, "DMRNet": "dmrnet"}.items():
        (line,) = re.findall(rf"^\| {re.escape(title)}[^|]*\|(.*)$", text, re.MULTILINE)
        printed = [float(cell) for cell in line.split("|")[:4]]
        found = [gains(EVERY[name](), n)[1:].square().sum().item() for n in (3, 9, 18, 36)]
        assert printed == pytest.approx(found, abs=0.005), name
