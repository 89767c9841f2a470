"""The benchmark of speed and memory, on small networks: what it compares, counts and writes. No time is judged."""

import csv

import pytest
import search_step
import speed_and_memory
import speed_table
import torch
from extras import needs
from measure import interleaved, peak_memory, ratio
from speed_and_memory import FIELDS, Form, folded


def test_functions_take_turns():
    calls = []
    times = interleaved([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(each) for each in times] == [3, 3]


def test_a_ratio_is_the_median_of_neighbours():
    assert ratio([1, 4, 9], [1, 2, 3]) == (2, 1.5, 2.5)
    assert ratio([1], [2]) == (0.5, 0.5, 0.5)


def test_memory_is_what_is_there_at_once_in_backward_passes_too():
    x = torch.ones(1000, requires_grad=True)
    x.grad = torch.zeros(1000)
    # forward: e^x and its sum, which keeps nothing; backward: the gradient of the sum is expanded, times e^x.
    assert peak_memory(lambda: x.exp().sum().backward()) == pytest.approx(8000, abs=100)


@pytest.mark.parametrize(("form", "less"), [("checkpointing", True), ("reversible", True), ("default", False)])
def test_training_rows(form, less):
    pairs = [(Form("hbnet20", form), Form("hbnet20_resnet"))]
    time, memory = speed_and_memory.training(4, 32, 1, pairs)
    assert (time["quantity"], memory["quantity"]) == ("time", "memory")
    assert (time["model"], time["form"], time["peer"]) == ("hbnet20", form, "hbnet20_resnet")
    assert memory["ratio"] == pytest.approx(memory["ours"] / memory["peers"])
    assert (memory["ratio"] < 0.7) == less


def test_channels_last_rows(monkeypatch):
    """Both sides are trained in that layout."""
    seen, build = [], Form.build

    def watched(form):
        model = build(form)
        model.conv1.register_forward_hook(
            lambda m, args, out: seen.append((form.name, *strided(args[0], out, m.weight)))
        )
        return model

    def strided(*tensors):
        return [t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors]

    monkeypatch.setattr(Form, "build", watched)
    monkeypatch.setattr(speed_and_memory, "CHANNELS_LAST", [(Form("hbnet20"), Form("hbnet20_resnet"))])
    time, memory = speed_and_memory.channels_last(4, 32, 1)
    assert (time["model"], time["peer"], memory["quantity"]) == ("hbnet20", "hbnet20_resnet", "memory")
    assert set(seen) == {("hbnet20", True, True, True), ("hbnet20_resnet", True, True, True)}


def test_the_peers_normalisations_are_folded():
    for name in ("resnet18", "densenet121"):
        model = Form(name).build().eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected, before = model(x), sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
            after = sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded(model).modules())
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
        assert after == {"resnet18": 0, "densenet121": 62}[name] < before


def test_the_command_writes_its_table(tmp_path, capsys):
    speed_and_memory.main(
        ["inference", "--batch", "1", "--size", "64", "--rounds", "2", "--out", f"{tmp_path}/a/b.csv"]
    )
    with open(tmp_path / "a/b.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == FIELDS
    assert [(row["model"], row["quantity"]) for row in rows] == [
        (model, quantity) for model in ("hbnet50", "agdnet121") for quantity in ("time", "memory")
    ]
    assert rows[0]["command"].startswith("python benchmarks/speed_and_memory.py inference")
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.slow
def test_search_rows():
    needs("nni")
    rows = list(speed_and_memory.search(2, 16, 1, channels=4, cells=3))
    memory = {(row["model"], row["form"]): row["ratio"] for row in rows if row["quantity"] == "memory"}
    assert len(rows) == 2 * len(search_step.SPACES)
    for space in ("hb space", "agd space"):
        assert memory[space, "checkpointing"] < memory[space, "default"] < 1


def test_the_readmes_table_is_that_of_the_files():
    readme = (speed_table.ROOT / "README.md").read_text(encoding="utf-8")
    text = readme.split(speed_table.BEGIN)[1].split(speed_table.END)[0]
    assert text == speed_table.table(speed_table.read_rows(speed_table.ROOT / "benchmarks" / "results"))
    assert text.count("\n| `") == len(speed_table.LINES)
