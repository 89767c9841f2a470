"""Figures show the computation of the algorithm."""

from itertools import pairwise

import pytest
import torch
from extras import needs
from my_algorithms import LearnedHeavyBall, OptimizedGradient

needs("matplotlib")

from optinspired_plugins import ALGORITHMS, HeavyBall, TwoPath, plotting, trace
from optinspired_plugins.algorithms.faster import TwoStep
from optinspired_plugins.plotting.cells import draw_pattern
from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS
from optinspired_plugins.propagation.patterns import pattern
from optinspired_plugins.propagation.tracing import NotLinearError
from optinspired_plugins.simulation import Run


def graph(algorithm, steps=4):
    nodes, edges = plotting.connections(trace(algorithm, steps))
    text = lambda node: node.label.strip("$").replace("{", "").replace("}", "")  # noqa: E731
    return nodes, {(text(nodes[e.source]), text(nodes[e.target])): e.weight for e in edges}


def test_gradient_descent_is_a_chain():
    chain = ["x_0", "T_0", "x_1", "T_1", "x_2", "T_2", "x_3"]
    assert graph(ALGORITHMS["gd"](), 3)[1] == dict.fromkeys(pairwise(chain), 1.0)


def test_the_heavy_ball_adds_two_iterates_to_each_layer():
    """(11): x_3 = T_2(x_2) + β x_2 − β x_1."""
    edges = graph(HeavyBall(0.3))[1]
    assert {source: weight for (source, target), weight in edges.items() if target == "x_3"} == {
        "T_2": 1.0,
        "x_2": 0.3,
        "x_1": -0.3,
    }


def test_nesterovs_layer_acts_on_a_point_between_iterates():
    edges = graph(ALGORITHMS["agd"]())[1]
    assert edges["y_3", "T_3"] == 1
    assert edges["x_3", "y_3"] + edges["x_2", "y_3"] == pytest.approx(1)
    assert [target for source, target in edges if source == "T_3"] == ["x_4"]


def test_admm_has_two_rows_and_a_multiplier_between_them():
    nodes, edges = graph(ALGORITHMS["admm"](), 3)
    assert edges["T'_2", "x'_3"] == edges["T_2", "x_3"] == edges["x'_3", "x_3"] == 0.5
    assert edges[r"\lambda_2", "x'_3"] == -0.5
    rows = {node.label: node.y for node in nodes}
    assert rows["$x'_{1}$"] > rows[r"$\lambda_{1}$"] > rows["$x_{1}$"]


@pytest.mark.parametrize("make", [*ALGORITHMS.values(), TwoPath, OptimizedGradient])
def test_no_two_nodes_lie_on_each_other_and_every_edge_goes_on(make):
    nodes, _ = graph(make(), 5)
    places = [(node.x, node.y) for node in nodes]
    for i, (x, y) in enumerate(places):
        for a, b in places[:i]:
            assert abs(x - a) > 0.25 or abs(y - b) > 0.3
    for edge in plotting.connections(trace(make(), 5))[1]:
        assert nodes[edge.target].x >= nodes[edge.source].x


def test_a_drawing_shows_every_node_and_weight():
    figure = plotting.draw_algorithm(OptimizedGradient(), 3, "mine")
    texts = [t.get_text() for t in figure.axes[0].texts]
    nodes, edges = plotting.connections(trace(OptimizedGradient(), 3))
    assert len(texts) == len(nodes) + sum(edge.weight != 1 for edge in edges)
    assert figure.axes[0].get_title() == "mine"


def test_what_cannot_be_drawn_says_why():
    with pytest.raises(NotLinearError, match="by a Parameter, not by a number"):
        plotting.draw_algorithm(LearnedHeavyBall())
    with pytest.raises(ValueError, match="steps=0"):
        plotting.draw_algorithm(HeavyBall(), 0)
    with pytest.raises(TypeError, match="has no method init"):
        plotting.draw_algorithm(object())


def test_convergence_draws_the_iterates_themselves():
    figure = plotting.draw_convergence(10.0, 50)
    for axes in figure.axes:
        lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        assert {"GD", "HB", "AGD", "AGD2", "ADMM"} <= lines.keys()
        assert lines["AGD"][-1] < lines["GD"][-1] < lines["ADMM"][-1] < 0.5 < lines["HB, β = 1"][-1]


def test_condition_numbers_label_the_fitted_power():
    axes = plotting.draw_condition_numbers((10, 100, 1_000)).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0].startswith("GD: ")
    assert [round(float(label.split("{")[1].rstrip("}$")), 1) for label in labels] == [1.0, 0.5, 0.5]


def test_the_simulation_shows_mean_spread_and_paper():
    runs = [Run("gd", 10, s, m, 0.0, 1.0) for s, m in ((0, 1.0), (1, 1.2))]
    (axes,) = plotting.draw_simulation(runs).axes
    measured, paper = axes.containers[0], axes.get_lines()[-1]
    assert measured.lines[0].get_ydata().tolist() == pytest.approx([1.1])
    (bar,) = measured.lines[2]
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([1.1 - 0.02**0.5, 1.1 + 0.02**0.5])
    assert list(paper.get_ydata()) == [1.00644]
    assert len(plotting.draw_simulation([*runs, Run("admm", 10, 0, 1.07, 0.0, 1.0)]).axes) == 2


def test_figures_can_be_written(tmp_path):
    for ending in ("png", "svg", "pdf"):
        file = tmp_path / f"a.{ending}"
        plotting.draw_algorithms(steps=3).savefig(file)
        assert file.stat().st_size > 5_000
    assert torch.get_default_dtype() == torch.float32


def labels(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_drawings_of_patterns_have_the_weights():
    hb = labels(draw_pattern(pattern(NETWORK_ALGORITHMS["hb"](), 4), "hb"))
    assert (hb.count("T"), hb.count("+1"), hb.count("−1")) == (4, 4, 4)
    crowded = labels(draw_pattern(pattern(NETWORK_ALGORITHMS["agd2"](), 4)))
    assert "0.025 T − 0.025" in crowded, "both edges of a source are one line"
    two_step = labels(draw_pattern(pattern(TwoStep(0.5, -0.25), 2)))
    assert two_step[:3] == ["0.5 T", "+0.25", "+0.25"]
