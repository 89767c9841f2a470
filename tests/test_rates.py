"""The rates of section 3, observed."""

import pytest
import torch

from optinspired_plugins.algorithms import rates

CONDITIONS = (10, 100, 1_000, 10_000)


@pytest.mark.parametrize(("name", "power"), [("gd", 1.0), ("hb", 0.5), ("agd", 0.5)])
def test_steps_grow_with_the_power_of_the_condition_number_that_section_3_gives(name, power):
    counts = [rates.steps_to_accuracy(rates.strongly_convex(k)[name], rates.quadratic(k)) for k in CONDITIONS]
    assert rates.fitted_exponent(CONDITIONS, counts) == pytest.approx(power, abs=0.04)


def test_the_objectives_have_the_condition_number_they_name():
    for condition in (5.0, 100.0):
        for make in (rates.quadratic, rates.tanh_objective):
            problem = make(condition)
            hessian = torch.autograd.functional.jacobian(problem.grad, problem.minimiser)
            values = torch.linalg.eigvalsh(hessian)
            assert problem.grad(problem.minimiser).norm() < 1e-12
            assert (1 / values[0]).item() == pytest.approx(condition)
            assert values[-1] <= 1 + 1e-12


def test_accuracy_counts_only_when_it_lasts():
    class Passing:
        """Reach the minimum in step 2, and leave it in step 3."""

        def init(self, x0):
            return (x0, 0)

        def step(self, state, grad):
            k = state[1] + 1
            return (state[0] * 0 + (0.0 if k == 2 or k > 5 else 1.0), k)

        def result(self, state):
            return state[0]

    assert rates.steps_to_accuracy(Passing(), rates.quadratic(10)) == 6


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="condition=0: must be finite and ≥ 1"):
        rates.quadratic(0)
    with pytest.raises(ValueError, match="condition=1: must be finite and > 1"):
        rates.tanh_objective(1)
    with pytest.raises(ValueError, match="limit=5: GradientDescent needs more steps"):
        rates.steps_to_accuracy(rates.strongly_convex(100)["gd"], rates.quadratic(100), limit=5)


def test_the_fit_recovers_an_exponent():
    assert rates.fitted_exponent([1, 10, 100], [3, 3 * 10**0.7, 3 * 100**0.7]) == pytest.approx(0.7)


def test_distances_start_at_one_and_end_at_the_iterate():
    problem = rates.quadratic(10)
    error = rates.distances(rates.strongly_convex(10)["gd"], problem, 3)
    curvature = torch.logspace(-1, 0, 50, dtype=torch.float64)
    assert error[0] == 1
    assert error[3].item() == pytest.approx(((1 - curvature) ** 3).norm().item() / 50**0.5)
