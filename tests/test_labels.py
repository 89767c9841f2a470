"""Labels of choices: text to type and back, and the two ways of naming every edge."""

import pytest

from optinspired_plugins.cells.genotype import EDGES, load_genotype
from optinspired_plugins.cells.labels import Label, edge_labels, slot_labels


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("normal/op_2_0", Label("normal", "op", 2, 0)),
        ("reduce/input_5_1", Label("reduce", "input", 5, 1)),
        ("normal/3_1", Label("normal", "edge", 3, 1)),
        ("reduce/beta_3", Label("reduce", "beta", 3)),
        ("normal/12_10", Label("normal", "edge", 12, 10)),
    ],
)
def test_a_label_is_its_text(text, label):
    assert Label.parse(text) == label
    assert str(label) == text
    assert f"{label.cell}/{label.name}" == text


@pytest.mark.parametrize(
    "text",
    ["", "normal", "normal/", "normal/op_2", "normal/beta_3_1", "normal/3", "cell/op_2_0", "normal/op_02_0"]
    + ["normal/op_2_0 ", "normal/op_2_0\n", "normal/op_-2_0", "normal/sum_2_0", "normal/op_2_٠", "a/normal/op_2_0"],
)
def test_other_text_is_no_label(text):
    with pytest.raises(ValueError, match=r"^label='.*: must be like normal/op_2_0, normal/3_1 or reduce/beta_3$"):
        Label.parse(text)


def test_labels_of_all_edges():
    assert [str(label) for label in edge_labels(2)] == [
        *("normal/2_0", "normal/2_1", "normal/3_0", "normal/3_1", "normal/3_2"),
        *("reduce/2_0", "reduce/2_1", "reduce/3_0", "reduce/3_1", "reduce/3_2"),
    ]
    assert [str(label) for label in slot_labels(1, 2)] == [
        *("normal/op_2_0", "normal/op_2_1", "reduce/op_2_0", "reduce/op_2_1"),
    ]


@pytest.mark.parametrize("name", ["darts_v2", "cifar10_hb_seed0"])
def test_slots_are_those_of_a_genotype(name):
    genotype = load_genotype(name)
    sample = genotype.to_nni()
    slots = list(map(str, slot_labels(genotype.nodes, EDGES[genotype.rule])))
    assert [key for key in sample if "/input_" not in key] == slots
