"""Genotypes: every form comes back as it was, and a file can do nothing but hold one."""

import errno
import json
import os
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from optinspired_plugins.cells import genotype as genotypes
from optinspired_plugins.cells.genotype import CHOICES, GENOTYPES, LIMIT_BYTES, Edge, Genotype, load_genotype
from optinspired_plugins.cells.operations import TABLE_6, ZERO

HB_NODE = lambda t: (Edge("sep_conv_3x3", t - 1), Edge("skip_connect", t - 1), Edge("neg_skip_connect", t - 2))  # noqa: E731
HB = Genotype("hb", tuple(HB_NODE(t) for t in range(2, 6)), tuple(HB_NODE(t) for t in range(2, 6)))
EVERY = {**GENOTYPES, "hb": HB}


@pytest.mark.parametrize("name", EVERY)
def test_forms_come_back(name, tmp_path):
    genotype = EVERY[name]
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert Genotype.from_nni(genotype.to_nni()) == genotype
    genotype.save(tmp_path / "g.json")
    assert load_genotype(tmp_path / "g.json") == load_genotype(str(tmp_path / "g.json")) == genotype
    assert json.loads((tmp_path / "g.json").read_text())["version"] == 1
    assert pickle.loads(pickle.dumps(genotype)) == genotype
    assert len({genotype, Genotype.from_json(genotype.to_json())}) == 1


def test_a_genotype_may_choose_what_table_6_has_but_zero():
    assert set(CHOICES) == set(TABLE_6) - {ZERO}


def test_reading_a_genotype_loads_no_torch(tmp_path):
    HB.save(tmp_path / "g.json")
    program = "import sys; from optinspired_plugins.cells.genotype import load_genotype; load_genotype(sys.argv[1]); "
    program += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "g.json")], check=True)


@pytest.mark.parametrize("name", GENOTYPES)
def test_darts_form_comes_back(name):
    fields = GENOTYPES[name].to_darts()
    assert Genotype.from_darts(**fields) == GENOTYPES[name]
    assert Genotype.from_darts(*(fields[k] for k in ("normal", "normal_concat", "reduce", "reduce_concat")))


# Normal and reduction edges in DARTS's order, from the authors' own releases.
PUBLISHED = {
    "darts_v1": (
        [("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_3x3", 1),
         ("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 2)],
        [("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 0),
         ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("avg_pool_3x3", 0)],
    ),
    "darts_v2": (
        [("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
         ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)],
        [("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1),
         ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)],
    ),
    "pc_darts_cifar": (
        [("sep_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 0), ("dil_conv_3x3", 1),
         ("sep_conv_5x5", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 0), ("dil_conv_3x3", 1)],
        [("sep_conv_5x5", 1), ("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_5x5", 2),
         ("sep_conv_3x3", 0), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("sep_conv_3x3", 2)],
    ),
    "pc_darts_image": (
        [("skip_connect", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 0), ("skip_connect", 1),
         ("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("dil_conv_5x5", 4)],
        [("sep_conv_3x3", 0), ("skip_connect", 1), ("dil_conv_5x5", 2), ("max_pool_3x3", 1),
         ("sep_conv_3x3", 2), ("sep_conv_3x3", 1), ("sep_conv_5x5", 0), ("sep_conv_3x3", 3)],
    ),
    "p_darts": (
        [("skip_connect", 0), ("dil_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1),
         ("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("sep_conv_3x3", 0), ("dil_conv_5x5", 4)],
        [("avg_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 2),
         ("max_pool_3x3", 0), ("dil_conv_3x3", 1), ("dil_conv_3x3", 1), ("dil_conv_5x5", 3)],
    ),
}  # fmt: skip


def test_published_genotypes_are_the_published_ones():
    concat = [2, 3, 4, 5]
    assert {name: genotype.to_darts() for name, genotype in GENOTYPES.items()} == {
        name: {"normal": normal, "normal_concat": concat, "reduce": reduction, "reduce_concat": concat}
        for name, (normal, reduction) in PUBLISHED.items()
    }


def test_nnis_names_are_those_of_its_hub():
    sample = GENOTYPES["darts_v2"].to_nni()
    assert len(sample) == 32
    assert sample["normal/op_5_1"] == "dil_conv_3x3"
    assert sample["normal/input_5_1"] == [2]
    assert sample["reduce/input_2_0"] == [0]
    assert len(HB.to_nni()) == 24
    assert HB.to_nni()["reduce/op_3_2"] == "neg_skip_connect"


def test_a_genotype_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        HB.rule = "agd"
    assert isinstance(Genotype("hb", [list(map(list, HB_NODE(2)))], [HB_NODE(2)]).normal[0][0], Edge)


def changed(**fields):
    return json.dumps({**json.loads(HB.to_json()), **fields})


def nodes(edge):
    return [[edge, ["skip_connect", 1], ["skip_connect", 0]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "genotype is not JSON"),
        (HB.to_json()[:200], "genotype is not JSON"),
        ("[" * 100_000, "genotype is not JSON"),
        ("[1]", "genotype is a list: must be a JSON object"),
        (changed(extra=1), r"fields \('extra'\): must be \['normal', 'reduction', 'rule', 'version'\]"),
        (changed(version=3), "version=3: must be 1 or 2"),
        (changed(version=True), "version=True: must be 1 or 2"),
        (changed(version="1"), "version='1': must be 1 or 2"),
        (changed(rule="darts"), "rule='darts': must be one of 'hb', 'agd'"),
        (changed(rule=["hb"]), r"rule=\['hb'\]: must be one of"),
        (changed(normal={}), "normal={}: must be a list of 1 to 64 nodes"),
        (changed(normal=[]), r"normal=\[\]: must be a list of 1 to 64 nodes"),
        (changed(reduction=[[]] * 65), "reduction=.*: must be a list of 1 to 64 nodes"),
        (changed(normal=[HB_NODE(2)]), "reduction has 4 nodes: must have 1, as normal has"),
        (changed(normal=["skip"]), r"normal\[0\]='skip': must be a list of 3 edges, as rule='hb' has"),
        (changed(normal=nodes("skip_connect")), r"normal\[0\]\[0\]='skip_connect': must be an operation and a source"),
        (changed(normal=nodes(["none", 1])), r"normal\[0\]\[0\] has operation 'none': must be one of max_pool_3x3"),
        (changed(normal=nodes(["os.system", 1])), r"has operation 'os.system': must be one of"),
        (changed(normal=nodes([["skip_connect"], 1])), r"has operation \['skip_connect'\]: must be one of"),
        (changed(normal=nodes(["skip_connect", 2])), r"has source 2: must be an integer from 0 to 1"),
        (changed(normal=nodes(["skip_connect", -1])), r"has source -1: must be an integer from 0 to 1"),
        (changed(normal=nodes(["skip_connect", True])), r"has source True: must be an integer"),
        (changed(normal=nodes(["skip_connect", 1.0])), r"has source 1.0: must be an integer"),
        (changed(normal=nodes(["skip_connect", 0])), r"normal\[0\] has sources \(0, 1, 0\): must be \(1, 1, 0\)"),
    ],
)
def test_what_is_no_genotype_is_named_by_field(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Genotype.from_json(text)
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(ValueError, match=r"g\.json: .*" + message):
        load_genotype(tmp_path / "g.json")


def test_messages_stay_short():
    with pytest.raises(ValueError, match="must be one of") as error:
        Genotype.from_json(changed(rule="x" * 10_000))
    assert len(str(error.value)) < 300


def test_files_that_are_no_text_or_too_large_or_missing(tmp_path):
    bad = tmp_path / "g.json"
    bad.write_bytes(pickle.dumps(HB))
    with pytest.raises(ValueError, match=r"g\.json"):
        load_genotype(bad)
    bad.write_bytes(b" " * (LIMIT_BYTES + 1))
    with pytest.raises(ValueError, match="larger than 1000000 bytes"):
        load_genotype(bad)
    with pytest.raises(ValueError, match=r"genotype='darts_v3': must be a JSON file or one of darts_v1, darts_v2"):
        load_genotype("darts_v3")
    with pytest.raises(TypeError, match=r"genotype=3: must be a Genotype, its to_dict\(\), a name or a path"):
        load_genotype(3)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, call):
    file = tmp_path / "g.json"
    HB.save(file)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        GENOTYPES["darts_v1"].save(file)
    assert Genotype.load(file) == HB
    assert list(tmp_path.iterdir()) == [file]


def test_a_saved_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    HB.save(tmp_path / "g.json")
    (tmp_path / "plain").touch()
    assert (tmp_path / "g.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_other_forms_name_what_is_wrong():
    with pytest.raises(ValueError, match="rule='hb': must be 'agd'"):
        HB.to_darts()
    fields = GENOTYPES["darts_v1"].to_darts()
    with pytest.raises(ValueError, match="reduce has 7 edges: must have two per node"):
        Genotype.from_darts(**{**fields, "reduce": fields["reduce"][:-1]})
    with pytest.raises(ValueError, match=r"normal_concat=\[4, 5, 6\]: must be all nodes, 2 to 5"):
        Genotype.from_darts(**{**fields, "normal_concat": [4, 5, 6]})
    sample = GENOTYPES["darts_v1"].to_nni()
    with pytest.raises(ValueError, match="sample has 'surprise': not an edge of 4 nodes"):
        Genotype.from_nni({**sample, "surprise": 1})
    with pytest.raises(ValueError, match="sample has no 'reduce/op_3_1'"):
        Genotype.from_nni({k: v for k, v in sample.items() if k != "reduce/op_3_1"})
    with pytest.raises(ValueError, match=r"normal\[0\]\[1\] has source \[0, 1\]: must be an integer"):
        Genotype.from_nni({**sample, "normal/input_2_1": [0, 1]})
    with pytest.raises(ValueError, match=r"has source \[\]: must be an integer"):
        Genotype.from_nni({**sample, "reduce/input_3_1": []})


def test_a_genotype_of_our_own_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(genotypes, "FOLDER", tmp_path)
    HB.save(tmp_path / "ours.json")
    assert load_genotype("ours") == HB
    with pytest.raises(ValueError, match=r"genotype='theirs': must be a JSON file or one of darts_v1, .*, ours$"):
        load_genotype("theirs")
    with pytest.raises(ValueError, match="must be a JSON file or one of"):
        load_genotype("../ours")
