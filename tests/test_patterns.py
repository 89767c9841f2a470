"""Patterns: the edges of the paper's cells, read off algorithms, compute what the algorithms compute."""

import pytest
import torch
from my_algorithms import LearnedHeavyBall
from my_algorithms import OptimizedGradient as OwnGradientMethod

from optinspired_plugins import HeavyBall, nesterov_weights
from optinspired_plugins.cells.genotype import heavy_ball_sources
from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS
from optinspired_plugins.propagation.patterns import Pattern, pattern
from optinspired_plugins.propagation.tracing import NotLinearError

NODES = 5
OLDER = {"tmm", "halpern"}  # its nodes depend on points before the inputs


def named(name, nodes=NODES, start=0):
    return pattern(NETWORK_ALGORITHMS[name](), nodes, start)


def kinds(found):
    return [[(edge.kind, edge.source) for edge in node] for node in found.nodes]


def signs(node):
    return [(edge.kind, edge.source, edge.weight > 0) for edge in node]


def test_gradient_descent_is_a_chain():
    assert named("gd") == Pattern(tuple(((("op", t - 1, 1.0)),) for t in range(2, 2 + NODES)), 1)


@pytest.mark.parametrize("start", [0, 1, 5])
def test_the_heavy_ball_is_equations_23_and_26(start):
    found = named("hb", start=start)
    for t, node in enumerate(found.nodes, start=2):
        assert node == (("op", t - 1, 1.0), ("lin", t - 1, 1.0), ("lin", t - 2, -1.0))
    assert found.sources == tuple(heavy_ball_sources(t) for t in range(2, 2 + NODES))
    for other in (HeavyBall(0.3), LearnedHeavyBall()):
        assert [signs(node) for node in pattern(other, NODES).nodes] == [signs(node) for node in found.nodes]


@pytest.mark.parametrize("start", [0, 3])
def test_the_summed_form_is_equation_28(start):
    """y_{k+1} = y_k − Σ_j h_{k+1,j} (y_j − T(y_j)), and input 0 is y_{start + 1}."""
    found, h = named("agd2", start=start), nesterov_weights(20)
    for t, node in enumerate(found.nodes, start=2):
        newest_first = range(t - 1, -1, -1)
        assert [(e.kind, e.source) for e in node] == [(k, j) for k in ("op", "lin") for j in newest_first]
        row = h[start + t, start + 1 : start + 1 + t].tolist()
        if start == 0:  # older points count as input 0
            got = {(e.kind, e.source): e.weight for e in node}
            assert [got["op", j] for j in range(t)] == pytest.approx(row, rel=1e-12)
            expected = [float(j == t - 1) - row[j] for j in range(t)]
            assert [got["lin", j] for j in range(t)] == pytest.approx(expected, rel=1e-9)
    merged = found.merged()
    assert kinds(merged) == [[("op", j) for j in range(t)] for t in range(2, 2 + NODES)]
    assert [e.weight for e in merged.nodes[0]] == [e.weight for e in found.nodes[0][1::-1]]


def test_admm_is_two_chains_with_shared_sums():
    found = named("admm", nodes=4)
    assert found.paths == 2
    assert kinds(found) == [
        [("op", t - 2), *(("lin", j) for j in range(t - 1, -1, -1))] for t in range(2, 6)
    ]  # λ is the sum of all differences
    # 2 z_2 = T(z_1) + y_1 − λ_1 and 2 y_2 = T(y_1) + z_2 + λ_1 with λ_1 = z_1 − y_1
    assert found.nodes[0] == (("op", 0, 0.5), ("lin", 1, 1.0), ("lin", 0, -0.5))
    assert found.nodes[1] == (("op", 1, 0.5), ("lin", 2, 0.5), ("lin", 1, -0.5), ("lin", 0, 0.5))


@pytest.mark.parametrize("algorithm", [NETWORK_ALGORITHMS["ogm"](), OwnGradientMethod()])
def test_the_optimised_gradient_method_has_two_layers_and_its_point(algorithm):
    """x_{k+1} = (1 + a + b) T(x_k) − a T(x_{k−1}) − b x_k with a = (t_k − 1)/t_{k+1} and b = t_k/t_{k+1}."""
    t = [1.0]
    for _ in range(NODES + 3):
        t.append((1 + (1 + 4 * t[-1] ** 2) ** 0.5) / 2)
    for node, edges in enumerate(pattern(algorithm, NODES).nodes, start=2):
        k = node  # input 0 is x_1, so node t is x_{t + 1}
        a, b = (t[k] - 1) / t[k + 1], t[k] / t[k + 1]
        assert [edge[:2] for edge in edges] == [("op", node - 1), ("op", node - 2), ("lin", node - 1)]
        assert [edge.weight for edge in edges] == pytest.approx([1 + a + b, -a, -b], rel=1e-12)


def points_of(algorithm, layers, x, steps):
    """The points of the first layers of an algorithm that runs, and their outputs."""
    points, outputs, state = [], [], algorithm.init(x)

    def gradient(z):
        points.append(z)
        outputs.append(layers[len(outputs)](z))
        return z - outputs[-1]

    for _ in range(steps):
        state = algorithm.step(state, gradient)
    return points, outputs


@pytest.mark.parametrize("name", NETWORK_ALGORITHMS)
def test_a_pattern_computes_the_points_of_its_algorithm(name):
    found = named(name)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(40, 4, 4, dtype=torch.float64, generator=generator)
    layers = [lambda z, w=w: torch.tanh(z @ w) for w in weights]
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    points, outputs = points_of(NETWORK_ALGORITHMS[name](), layers, x, NODES + 3)
    points, outputs = points[found.paths :], outputs[found.paths :]
    for t, node in enumerate(found.nodes, start=2):
        value = sum(e.weight * (outputs if e.kind == "op" else points)[e.source] for e in node)
        assert torch.allclose(value, points[t], rtol=1e-9, atol=1e-12) == (name not in OLDER)


def test_older_points_count_as_input_0():
    """Every weight of triple momentum's points is there: they sum to 1 as in the algorithm."""
    for node in named("tmm").nodes:
        assert sum(edge.weight for edge in node) == pytest.approx(1)
        assert [edge.source for edge in node if edge.kind == "op"] == [*range(len(node) // 2)][::-1]


# --- what has no pattern ----------------------------------------------------------------------------------------------


class Variant:
    """Gradient descent, but for one step."""

    def __init__(self, step):
        self.step_of = step

    def init(self, x0):
        return x0

    def step(self, state, grad):
        return self.step_of(state, grad)

    def result(self, state):
        return state


def unused_layer(z, grad):
    grad(z)
    return z / 2


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (Variant(lambda z, grad: z - grad(z) / z.norm()), r"uses \.norm of an iterate"),
        (Variant(lambda z, grad: torch.relu(z - grad(z))), "calls relu on an iterate"),
        (Variant(lambda z, grad: z / 2), "step 0 of Variant asks for no gradient: it has no layer"),
        (Variant(unused_layer), "algorithm=Variant: node 2 has no op edge, must depend on a layer"),
        (
            Variant(lambda z, grad: z - grad(z - grad(z - grad(z)))),
            "algorithm=Variant has 3 layers per step: must have one or two, a cell has two inputs",
        ),
    ],
)
def test_what_has_no_pattern_says_why(algorithm, message):
    with pytest.raises(ValueError, match=message):
        pattern(algorithm, 4)


def test_other_refusals():
    with pytest.raises(NotLinearError):
        pattern(Variant(lambda z, grad: z * z - grad(z)), 4)
    with pytest.raises(ValueError, match="nodes=1: must be an integer ≥ 2"):
        named("hb", nodes=1)
    with pytest.raises(ValueError, match="start=-1: must be an integer ≥ 0"):
        named("hb", start=-1)
    with pytest.raises(ValueError, match="merge=True with 2 paths: must be False"):
        named("admm").merged()
    with pytest.raises(TypeError, match="has no method init"):
        pattern("hb", 4)


def test_a_number_of_layers_that_changes_is_refused():
    class Growing(Variant):
        def init(self, x0):
            return x0, 0

        def step(self, state, grad):
            z, k = state
            z = z - grad(z)
            return (z - grad(z) if k else z), k + 1

        def result(self, state):
            return state[0]

    with pytest.raises(ValueError, match=r"has \(1, 2, .*\) layers in its steps: must have one number of them"):
        pattern(Growing(None), 4)


def test_two_layers_per_step_may_follow_each_other():
    """The extragradient method: y = T(z), and then z − y + T(y)."""
    found = pattern(Variant(lambda z, grad: z - grad(z - grad(z))), 2)
    assert found.nodes == (
        (("op", 1, 1.0), ("lin", 1, -1.0), ("lin", 0, 1.0)),
        (("op", 2, 1.0),),
    )
