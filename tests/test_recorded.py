"""Algorithms as data: the same program to the bit, and nothing that is read is believed."""

import copy
import json
import math

import pytest
import torch
from my_algorithms import LearnedHeavyBall, OptimizedGradient
from torch import nn

from optinspired_plugins import HeavyBall, Nesterov, TwoPath, Unrolled, minimize, trace
from optinspired_plugins.propagation.recorded import LIMIT_STEPS, RecordedAlgorithm, record
from optinspired_plugins.propagation.tracing import Call, NotLinearError
from timm_models import NETWORK_ALGORITHMS


class Extragradient:
    """Two gradients a step, the second at another point."""

    def init(self, x0):
        return x0

    def step(self, x, grad):
        return x - grad(x - grad(x) / 2)

    def result(self, x):
        return x


ALGORITHMS = {
    **{name: make() for name, make in NETWORK_ALGORITHMS.items()},
    "β = 0.7": HeavyBall(0.7),
    "strongly convex": Nesterov(0.4),
    "two paths": TwoPath(0.2, 0.7),
    "optimised gradient": OptimizedGradient(),
    "extragradient": Extragradient(),
}
every = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


def read_again(algorithm, steps):
    return RecordedAlgorithm.from_dict(json.loads(json.dumps(record(algorithm, steps).to_dict())))


def bare(program):
    """A program without the names that states give their fields."""
    return program.result, program.calls, [i if isinstance(i, Call) else i.terms for i in program.instructions]


@pytest.mark.parametrize("steps", [1, 2, 5])
@every
def test_the_program_is_the_same_also_of_fewer_steps(algorithm, steps):
    recorded = read_again(algorithm, 5)
    assert bare(trace(recorded, steps, transition=True)) == bare(trace(algorithm, steps, transition=True))


@every
def test_it_is_an_algorithm(algorithm):
    """As an optimiser and as a network, where the sums come in another order."""
    recorded = read_again(algorithm, 4)
    x0 = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def grad(z):
        return z / 3 + 0.1

    torch.testing.assert_close(minimize(recorded, grad, x0, 4), minimize(algorithm, grad, x0, 4))
    calls = trace(algorithm, 4).calls
    layers = [[nn.Linear(3, 3).double() for _ in range(count)] for count in calls]
    layers = [group[0] for group in layers] if set(calls) == {1} else layers
    torch.testing.assert_close(Unrolled(recorded, layers)(x0), Unrolled(algorithm, layers)(x0))


def test_more_steps_than_recorded_are_refused():
    with pytest.raises(ValueError, match="algorithm has 2 recorded steps: must have as many as the longest stage"):
        minimize(record(HeavyBall(), 2), lambda z: z, torch.ones(1), 3)


@pytest.mark.parametrize("algorithm", [LearnedHeavyBall(), HeavyBall(torch.tensor(0.5))])
def test_what_only_code_describes_is_not_recorded(algorithm):
    with pytest.raises(NotLinearError):
        record(algorithm, 2)


SOUND = record(HeavyBall(0.7), 2).to_dict()
HUGE = 10**400


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version=2: must be 1"),
        (("version",), True, "version=True: must be 1"),
        (("more",), 1, r"algorithm has fields \['more', 'results', 'steps', 'version'\]: must have version"),
        (("steps",), "gd", "steps='gd': must be a list with at least one entry"),
        (("steps",), [], r"steps=\[\]: must be a list"),
        (("steps",), [[-1]] * (LIMIT_STEPS + 1), "steps has 1001 entries: must have at most 1000"),
        (("results",), [[[1, 1.0]]], "results has 1 entries: must have 2, one per step"),
        (("steps", 0), {}, r"steps\[0\]={}: must be a list"),
        (("steps", 0), [[[0, 1.0]]], r"steps\[0\] has no call: must have a layer"),
        (("steps", 0, 0), -2, r"steps\[0\]\[0\] has register -2: must be an integer from -1 to 0"),
        (("steps", 0, 0), 1, r"steps\[0\]\[0\] has register 1: must be an integer from -1 to 0"),
        (("steps", 0, 0), True, r"steps\[0\]\[0\] has register True"),
        (("steps", 0, 0), "os:system", r"steps\[0\]\[0\] has register 'os:system'"),
        (("steps", 0, 0), None, r"steps\[0\]\[0\] has register None"),
        (("steps", 1, 0), -1, r"steps\[1\]\[0\] has register -1: must be an integer from 0"),
        (("steps", 0, 1), [], r"steps\[0\]\[1\]=\[\]: must be a list"),
        (("steps", 0, 1, 0), [0], r"steps\[0\]\[1\]\[0\]=\[0\]: must be a register and a weight"),
        (("steps", 0, 1, 0), 1.5, r"steps\[0\]\[1\]\[0\]=1.5: must be a register and a weight"),
        (("steps", 0, 1, 0, 0), 2, r"steps\[0\]\[1\]\[0\] has register 2: must be an integer from 0 to 1"),
        (("steps", 0, 1, 0, 1), math.nan, r"steps\[0\]\[1\]\[0\] has weight nan: must be a finite number"),
        (("steps", 0, 1, 0, 1), -math.inf, "has weight -inf"),
        (("steps", 0, 1, 0, 1), HUGE, "has weight 1000"),
        (("steps", 0, 1, 0, 1), "1", "has weight '1'"),
        (("steps", 0, 1, 0, 1), False, "has weight False"),
        (("results", 0, 0, 0), -1, r"results\[0\]\[0\] has register -1: must be an integer from 0 to 2"),
        (("results", 0, 0, 0), 3, r"results\[0\]\[0\] has register 3: must be an integer from 0 to 2"),
    ],
    ids=str,
)
def test_what_is_no_algorithm_is_named(path, value, message):
    data = copy.deepcopy(SOUND)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        RecordedAlgorithm.from_dict(data)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"algorithm has fields \['version'\]: must have version, steps, results"):
        RecordedAlgorithm.from_dict(dict(version=1))
