"""A registered operation goes from a space to genotype, network, drawing and report, and unknown ones are refused."""

import json
import re
import shlex

import pytest
import torch
from extras import needs

needs("nni", "sklearn")

import timm
from report_runs import make_history, write_run
from torch import nn

from nni_spaces import DARTSSpace, HBSpace
from nni_spaces.runs.settings import SearchSettings
from nni_spaces.spaces.mixed_op import NodeInput, NodeSum, mixed_op
from optinspired_plugins import register_operation
from optinspired_plugins.cells.drawing import LOOKS, to_svg
from optinspired_plugins.cells.genotype import CHOICES, Genotype
from optinspired_plugins.cells.operations import DARTS_OPERATIONS, OPERATIONS, TABLE_6, import_modules, make_operation
from optinspired_plugins.next_steps import retrain_command
from optinspired_plugins.report.page import write_report


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels, stride, affine):
        super().__init__()
        self.pool, self.gate = nn.AvgPool2d(3, stride, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        x = self.pool(x)
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class Doubled(nn.Sequential):
    """Layers that look like those of Table 6, and another forward."""

    def __init__(self, channels, stride, affine):
        norm = nn.BatchNorm2d(channels, affine=affine)
        super().__init__(nn.ReLU(), nn.Conv2d(channels, channels, 1, stride, bias=False), norm)

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def register():
    """Register operations that are forgotten after the test."""
    names = set(OPERATIONS)
    yield register_operation
    for name in set(OPERATIONS) - names:
        del OPERATIONS[name], LOOKS[name]
        CHOICES.remove(name)


def genotype_of(name):
    node = [[name, 1], ["sep_conv_3x3", 1], [name, 0]]
    return {"version": 1, "rule": "hb", "normal": [node], "reduction": [node]}


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_name_is_registered_once(register):
    register("gate", Gate)
    register("gate", Gate)
    assert (CHOICES.count("gate"), OPERATIONS["gate"]) == (1, Gate)
    assert isinstance(make_operation("gate", 4, 2), Gate)
    for name in ("gate", "skip_connect"):
        with pytest.raises(ValueError, match=f"name='{name}': has another factory already"):
            register(name, Doubled)
    for name in ("", "3x3", "a b", "<b>", "a" * 21, "größe", None):
        with pytest.raises(ValueError, match=f"name={re.escape(repr(name))}: must be a letter, and at most 19"):
            register(name, Gate)
    with pytest.raises(TypeError, match="factory=None: must be a function"):
        register("none2", None)


def test_the_defaults_of_the_spaces_stay(register):
    register("gate", Gate)
    assert "gate" not in HBSpace(channels=4, cells=3, nodes=1).operations
    assert (len(TABLE_6), len(DARTS_OPERATIONS)) == (9, 8)


def test_unknown_operations_are_refused_with_the_way_to_register_them(register):
    register("gate", Gate)
    advice = r"must be .*neg_skip_connect, gate, or registered before by register_operation.* after --import"
    with pytest.raises(ValueError, match=r"normal\[0\]\[0\] has operation 'gates': " + advice):
        Genotype.from_dict(genotype_of("gates"))
    with pytest.raises(ValueError, match="operations has 'gates': " + advice):
        HBSpace(channels=4, cells=3, nodes=1, operations=["skip_connect", "gates"])
    with pytest.raises(ValueError, match="operation='gates': " + advice):
        make_operation("gates", 4, 1)


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (lambda c, s, a: nn.Conv2d(c, c, 3, s), ValueError, r"stride=1: returns the shape \(1, 4, 5, 5\) for .*"),
        (lambda c, s, a: nn.Conv2d(c, c, 1), ValueError, r"stride=2: returns the shape .* must be \(1, 4, 4, 4\)"),
        (lambda c, s, a: nn.ReLU(inplace=True), ValueError, "stride=1: changes its input in place, must not"),
        (lambda c, s, a: torch.relu, TypeError, "its factory returns builtin_function_or_method, must be an nn.Module"),
    ],
)
def test_a_factory_that_does_not_fit_is_named(factory, error, message, register):
    register("other", factory)
    with pytest.raises(error, match=f"operation='other'.*{message}"):
        HBSpace(channels=4, cells=3, nodes=1, operations=["skip_connect", "other"])


def test_making_a_space_draws_the_same_numbers_with_and_without_the_check(register):
    states = []
    for name in ("sep_conv_3x3", "copy"):
        register("copy", OPERATIONS["sep_conv_3x3"])
        torch.manual_seed(0)
        HBSpace(channels=4, cells=3, nodes=1, operations=["skip_connect", name])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# --- supernet, network, drawing, report -------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [Gate, Doubled])
def test_the_fast_sum_is_the_definition(factory, register):
    register("own", factory)
    torch.manual_seed(0)
    operations = {name: make_operation(name, 4, 1, False, True) for name in ("skip_connect", "own", "sep_conv_3x3")}
    weights, x = torch.randn(4), torch.randn(2, 4, 5, 5)
    node = NodeSum()
    node.add_edge(weights, operations, NodeInput(x))
    torch.testing.assert_close(node.value(), mixed_op(weights, operations, x))


@pytest.mark.parametrize("space", [HBSpace, DARTSSpace])
def test_a_sample_of_a_space_is_a_genotype_and_a_timm_model(space, register):
    register("gate", Gate)
    made = space(channels=4, cells=3, nodes=1, num_classes=2, operations=["gate"])
    sample = {}
    made.random(sample)
    genotype = made.genotype(sample)
    assert Genotype.from_json(genotype.to_json()) == genotype
    model = timm.create_model("cellnet_cifar", genotype=genotype, cells=3, channels=4, num_classes=2)
    assert sum(isinstance(module, Gate) for module in model.modules()) == sum(
        len(cell[0]) * count for cell, count in ((genotype.normal, 1), (genotype.reduction, 2))
    )
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 2)


class Backwards(nn.Sequential):
    """A normalisation before a convolution that stands before it."""

    def __init__(self, channels, stride, affine):
        super().__init__(nn.Conv2d(channels, channels, 1, stride), nn.BatchNorm2d(channels, affine=affine))

    def forward(self, x):
        conv, norm = self
        return conv(norm(x))


def reflecting(channels, stride, affine):
    conv = nn.Conv2d(channels, channels, 3, stride, 1, padding_mode="reflect")
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(channels, affine=affine))


@pytest.mark.parametrize("factory", [Backwards, reflecting, Doubled])
def test_a_fused_network_is_the_same(factory, register):
    register("own", factory)
    torch.manual_seed(0)
    options = dict(genotype=genotype_of("own"), cells=3, channels=4, num_classes=2)
    model = timm.create_model("cellnet_cifar", **options).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):  # statistics that are not those of the start
        model(x)
    expected = model.eval()(x)
    torch.testing.assert_close(model.fuse()(x), expected)


def test_it_is_drawn_and_reported(register, tmp_path):
    register("gate", Gate)
    history = make_history("hb", 2, nodes=1)
    for entry in history:
        entry["genotype"] = genotype_of("gate")
        for row in entry["probabilities"].values():
            row["gate"] = row.pop("max_pool_3x3")
    page = write_report(write_run(tmp_path, history)).read_text(encoding="utf-8")
    assert '<g class="own"><title>gate: 1 → 2</title>' in page
    assert ".own { --c: var(--own); }" in page
    assert '"gate"' in page.split('id="data">')[1]
    assert 'class="own"' in to_svg(Genotype.from_dict(genotype_of("gate")).normal, "a cell")


# --- where it is imported from ----------------------------------------------------------------------------------------


def test_modules_and_files_are_imported(tmp_path, monkeypatch, register):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    text = "from optinspired_plugins import register_operation\nregister_operation('ofafile', lambda c, s, a: None)\n"
    (tmp_path / "operations_of_a_test.py").write_text(text)
    assert import_modules(["operations_of_a_test.py", "json"]) == [str(tmp_path / "operations_of_a_test.py"), "json"]
    assert "ofafile" in CHOICES
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ValueError, match=r"import='json\.py': another module is named json: must have another name"):
        import_modules(["json.py"])
    with pytest.raises(ValueError, match=r"import='no\.py': must be a file, or the name of a module"):
        import_modules(["no.py"])
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_modules(["no_such_module"])


def test_settings_import_nothing_and_the_printed_command_carries_the_modules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = SearchSettings(imports=("no_such_module",), operations=("gates",))
    assert (settings.imports, settings.operations) == (["no_such_module"], ["gates"])
    (tmp_path / "own.py").write_text("")
    words = shlex.split(retrain_command("a.json", {"imports": ["own.py", "no_such_module"]}))
    assert words[3:] == ["--import", f"{tmp_path}/own.py,no_such_module"]
    for value in ("gates", [], [1], [""]):
        for name in ("imports", "operations"):
            with pytest.raises(ValueError, match=f"{name}={re.escape(repr(value))}: must be a list of names, or None"):
                SearchSettings(**{name: value})


@pytest.mark.slow
def test_a_search_and_what_it_prints_from_the_command_line(tmp_path):
    needs("typer", "rich", "matplotlib")
    from test_cli import run
    from test_printed_commands import after, shell

    (tmp_path / "gates.py").write_text(
        "from torch import nn\nfrom optinspired_plugins import register_operation\n\n"
        "register_operation('gate', lambda channels, stride, affine: nn.AvgPool2d(3, stride, 1))\n"
    )
    tiny = ["--limit", "40", "--batch-size", "8", "--epochs", "1", "--cells", "3", "--channels", "2"]
    own = ["--nodes", "1", "--operations", "gate", "--import", "gates.py", "--data", "digits"]
    searched = run("search", "--out", "run", *own, *tiny, "--accelerator", "cpu", folder=tmp_path).stdout
    found = json.loads((tmp_path / "run/genotype.json").read_text())
    assert found["normal"] == [[["gate", 1], ["gate", 1], ["gate", 0]]]
    command = after("Train it", searched)
    shell(f"{command} {shlex.join(tiny)}", tmp_path / "elsewhere")
    without = run("report", "run", folder=tmp_path, ok=False).stderr
    assert "registered before by register_operation" in without
    run("report", "run", "--import", "gates", folder=tmp_path)
    run("plot", "cells", "run/genotype.json", "--import", "gates", "--out", "a.svg", folder=tmp_path)
    assert (tmp_path / "a.svg").exists()
