"""Drawings of cells: every edge from its source to its node, and no label on another."""

from collections import Counter
from itertools import combinations, pairwise, product

import pytest
from extras import needs
from report_runs import make_history

needs("matplotlib")

from optinspired_plugins import plotting
from optinspired_plugins.cells.drawing import COLOURS, HEIGHT, LOOKS, OWN, PITCH, WIDTH, lay_out, to_svg
from optinspired_plugins.cells.genotype import CHOICES, GENOTYPES, Genotype
from optinspired_plugins.cells.operations import ZERO


def random_cells():
    for rule in ("hb", "agd"):
        for nodes in (1, 4, 9):
            for entry in make_history(rule, 3, nodes):
                data = entry["genotype"]
                genotype = Genotype(data["rule"], data["normal"], data["reduction"])
                yield from (genotype.normal, genotype.reduction)


CELLS = [*random_cells(), *(cell for g in GENOTYPES.values() for cell in (g.normal, g.reduction))]
# A random sample of NNI may have both edges of a node from one input.
CELLS.append(Genotype("agd", *[[[("skip_connect", 0), ("skip_connect", 0)]] * 3] * 2).normal)


def label_box(wire):
    """Left, top, right and bottom of a label of 12 pixels, 7.5 a character at most."""
    half, (x, y) = 3.75 * len(LOOKS[wire.edge.operation].label), wire.label
    return x - half, y - 12, x + half, y + 3


def meet(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def lines(corners):
    for (x0, y0), (x1, y1) in pairwise(corners):
        yield min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1


def test_every_operation_has_a_look_and_a_colour():
    assert set(LOOKS) == {*CHOICES, ZERO}
    assert {look.family for look in LOOKS.values()} | {OWN} == set(COLOURS)
    assert len({look.label for look in LOOKS.values()}) == len(LOOKS)


@pytest.mark.parametrize("cell", CELLS)
def test_every_edge_runs_from_its_source_to_its_node(cell):
    layout = lay_out(cell)
    drawn = Counter((wire.target, wire.edge) for wire in layout.wires)
    assert drawn == Counter((t, edge) for t, node in enumerate(cell, start=2) for edge in node)
    assert len(layout.boxes) == len(cell) + 3
    for wire in layout.wires:
        start, end = layout.boxes[wire.edge.source], layout.boxes[wire.target]
        for (x, y), box in ((wire.corners[0], start), (wire.corners[-1], end)):
            assert abs(x - box.x) <= WIDTH / 2
            assert abs(y - box.y) <= HEIGHT / 2
        assert start.x < wire.label[0] < end.x
    assert {corners[0][0] for corners in layout.concat} == {box.x for box in layout.boxes[2:-1]}


def test_of_two_edges_between_neighbours_one_is_straight():
    cell = Genotype("hb", *[[[("skip_connect", 1), ("sep_conv_3x3", 1), ("max_pool_3x3", 0)]]] * 2).normal
    straight = [wire.edge.operation for wire in lay_out(cell).wires if len(wire.corners) == 2]
    assert straight == ["skip_connect"]


@pytest.mark.parametrize("cell", CELLS)
def test_no_label_lies_on_a_label_a_line_or_a_box(cell):
    layout = lay_out(cell)
    labels = {wire: label_box(wire) for wire in layout.wires}
    assert len(labels) == len(layout.wires)
    for a, b in combinations(labels.values(), 2):
        assert not meet(a, b)
    for wire, label in labels.items():
        for other in layout.wires:
            if other is not wire:
                assert not any(meet(label, line) for line in lines(other.corners))
        for box in layout.boxes:
            half = (WIDTH / 2, HEIGHT / 2)
            assert not meet(label, (box.x - half[0], box.y - half[1], box.x + half[0], box.y + half[1]))
        assert label[1] >= 0
        assert 0 <= label[0] <= label[2] <= layout.width


@pytest.mark.parametrize("cell", CELLS)
def test_no_two_edges_lie_on_each_other(cell):
    for a, b in combinations(lay_out(cell).wires, 2):
        for (p, q), (r, s) in product(pairwise(a.corners), pairwise(b.corners)):
            for axis in (0, 1):
                if p[axis] == q[axis] == r[axis] == s[axis]:
                    low, high = sorted((p[1 - axis], q[1 - axis])), sorted((r[1 - axis], s[1 - axis]))
                    assert min(low[1], high[1]) <= max(low[0], high[0])


def test_the_svg_has_every_edge_in_the_colour_of_its_family_and_no_address():
    svg = to_svg(GENOTYPES["darts_v2"].normal, 'a "cell"')
    assert svg.count('<g class="sep">') == 5
    assert svg.count('<g class="skip">') == 2
    assert svg.count('<g class="dil">') == 1
    assert "<title>dil_conv_3x3: 2 → 5</title>" in svg
    assert 'aria-label="a &quot;cell&quot;"' in svg
    assert "http" not in svg
    assert len(svg) < 4_000


def test_the_figure_labels_every_edge_and_box():
    genotype = GENOTYPES["p_darts"]
    figure = plotting.draw_cells(genotype)
    for axes, cell in zip(figure.axes, (genotype.normal, genotype.reduction)):
        texts = Counter(text.get_text() for text in axes.texts)
        edges = Counter(LOOKS[edge.operation].label for node in cell for edge in node)
        assert texts == edges + Counter(["$c_{k−2}$", "$c_{k−1}$", "$c_{k}$", "2", "3", "4", "5"])
    assert [axes.get_title("left") for axes in figure.axes] == ["normal cell", "reduction cell"]
    width = plotting.draw_cell(genotype.normal, "mine").axes[0].get_xlim()[1]
    assert width == 6 * PITCH + WIDTH + 4
