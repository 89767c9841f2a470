"""The report: what it says is what the files say, it needs nothing else, and a browser runs it without complaint."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import make_history, make_retrain, write_run

from optinspired_plugins.cells.genotype import GENOTYPES, Genotype
from optinspired_plugins.report.data import changes, entropy, margin, strongest, thinned
from optinspired_plugins.report.files import read_run
from optinspired_plugins.report.page import embedded, render, write_report

ROOT = Path(__file__).parents[1]
VOID = {"meta", "input", "br"}
ABOUT = {
    "versions": {"python": "3.11.7", "nni": "3.0"},
    "data": {"images": 1797, "sha256": "ab" * 32},
    "parameters": 1674874,
    "architecture_parameters": 216,
}


class Page(HTMLParser):
    """Text and data of a page, by the id of the element they stand in."""

    def __init__(self, source):
        super().__init__()
        self.texts, self.attributes, self.tags, self.open = {}, {}, [], []
        self.feed(source)
        self.close()
        assert not self.open
        self.data = json.loads(self.texts["data"])

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append((tag, attrs.get("id")))
        if "id" in attrs:
            assert attrs["id"] not in self.attributes
            self.attributes[attrs["id"]] = attrs

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for name in {name for _, name in self.open if name}:
            self.texts[name] = self.texts.get(name, "") + text


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


# --- what it says -----------------------------------------------------------------------------------------------------


def test_a_search_without_retraining_calls_its_accuracy_no_test_result(tmp_path):
    page = page_of(write_run(tmp_path / "hb", make_history("hb", 3), about=ABOUT))
    verdict = page.texts["verdict"]
    assert verdict.strip().startswith(f"{90 - 80 / 1.4 - 1:.2f} %")
    assert "this is no test result" in verdict
    assert "1,674,874supernet; 216 of architecture" in verdict
    assert "not measured" in verdict
    assert "Seed7" in verdict
    assert "Unfinished" not in verdict


def test_the_verdict_of_a_retrained_network_is_its_last_epoch_and_the_best_is_called_chosen(tmp_path):
    history = make_history("hb", 3)
    page = page_of(write_run(tmp_path / "hb", history, about=ABOUT, retrain=make_retrain(resumed=(1,))))
    verdict = page.texts["verdict"]
    assert verdict.strip().startswith("96.25 %")
    assert "Best: 97.50 % in epoch 2, which was chosen by looking at the test images" in verdict
    assert "3,349,342retrained network, without auxiliary head" in verdict
    assert "528,000,000retrained network, one image" in verdict
    assert "Unfinished" not in verdict
    assert page.data["curves"]["retrain"]["resumed"] == [2]
    assert page.data["curves"]["retrain"]["test_top1"] == [50.0, 97.5, 96.25]


def test_what_is_unfinished_says_so(tmp_path):
    page = page_of(write_run(tmp_path / "a", make_history("hb", 1), finished=False, settings={"epochs": 50}))
    assert "Unfinished: 1 of 50 epochs of the search." in page.texts["verdict"]
    assert "When the search is finished" in page.texts["retrain"]
    page = page_of(write_run(tmp_path / "b", make_history("hb", 2), retrain=make_retrain(epochs=5)))
    assert "Unfinished: 3 of 5 epochs of the retraining." in page.texts["verdict"]
    page = page_of(write_run(tmp_path / "c", make_history("hb", 2), retrain=make_retrain(tests=(), epochs=5)))
    assert "Unfinished: 0 of 5 epochs of the retraining." in page.texts["verdict"]
    assert "no test result" in page.texts["verdict"]


def test_another_genotype_than_the_histories_is_said(tmp_path):
    folder = write_run(tmp_path / "hb", make_history("agd", 2), retrain=make_retrain(genotype_sha256="0" * 64))
    GENOTYPES["darts_v2"].save(folder / "genotype.json")
    verdict = page_of(folder).texts["verdict"]
    assert "genotype.json is not the genotype of the last epoch" in verdict
    assert "The retraining was of another genotype" in verdict
    Genotype.from_json(json.dumps(make_history("agd", 2)[-1]["genotype"])).save(folder / "genotype.json")
    about = folder / "retrain" / "run.json"
    about.write_text(json.dumps({"genotype_sha256": read_run(folder).hashes["genotype.json"]}))
    text = json.loads((folder / "genotype.json").read_text())
    (folder / "genotype.json").write_text(json.dumps(text))  # the same in other words
    verdict = page_of(folder).texts["verdict"]
    assert "genotype.json is not" not in verdict
    assert "another genotype" not in verdict


@pytest.mark.parametrize(("rule", "beta"), [("hb", False), ("agd", True), ("agd", False)])
def test_the_script_gets_alpha_beta_entropy_margin_and_counts(tmp_path, rule, beta):
    history = make_history(rule, 4, beta=beta, resumed=(2,))
    page = page_of(write_run(tmp_path / "run", history))
    data = page.data
    assert data["epochs"] == [1, 2, 3, 4]
    assert data["curves"]["search"]["resumed"] == [3]
    assert data["curves"]["search"]["alpha_top1"] == [entry["alpha_top1"] for entry in history]
    name = "0 → 2"
    edge = next(i for i, e in enumerate(data["edges"]) if (e["cell"], e["name"]) == ("reduction", name))
    row = history[1]["probabilities"]["reduce/op_2_2" if rule == "hb" else "reduce/2_0"]
    assert data["alpha"][1][edge] == pytest.approx([row[operation] for operation in data["operations"]], abs=1e-4)
    assert data["entropy"][1][edge] == pytest.approx(-sum(p * math.log(p) for p in row.values()), abs=1e-6)
    ranked = sorted((p for operation, p in row.items() if operation != "none"), reverse=True)
    assert data["margin"][1][edge] == pytest.approx(ranked[0] - ranked[1], abs=1e-6)
    assert row[data["operations"][data["strongest"][1][edge]]] == ranked[0]
    node = history[1]["genotype"]["reduction"][0]
    assert data["chosen"][1][edge] == [operation for operation, source in node if source == 0]
    if beta:
        assert data["beta"][1][edge] == pytest.approx(history[1]["probabilities"]["reduce/beta_2"]["0"], abs=1e-6)
    else:
        assert data["beta"] == []
        assert "This space has no β" in page.texts["alpha"]
    counted = [operation for node in history[3]["genotype"]["normal"] for operation, _ in node]
    assert data["counts"]["normal"][3] == {operation: counted.count(operation) for operation in counted}


def test_two_edges_between_a_pair_of_nodes_have_two_names(tmp_path):
    data = page_of(write_run(tmp_path / "hb", make_history("hb", 1))).data
    names = ["1 → 2 (1)", "1 → 2 (2)", "0 → 2", "2 → 3 (1)", "2 → 3 (2)", "1 → 3"]
    assert [edge["name"] for edge in data["edges"]][:6] == names


def test_a_network_that_diverges_has_a_report(tmp_path):
    retrain = make_retrain()
    for entry, loss in zip(retrain["history"], (1.6e300, math.inf, math.nan)):
        entry["test_loss"] = loss
    page = page_of(write_run(tmp_path / "run", make_history("hb", 1), retrain=retrain))
    assert page.data["curves"]["retrain"]["test_loss"] == [1.6e300, None, None]
    assert "A loss was not finite" in page.texts["verdict"]


def test_a_stage_that_lacks_candidates_has_a_report(tmp_path):
    """As in P-DARTS, where every edge keeps candidates of its own."""
    history = make_history("agd", 2)
    for entry in history:
        row = entry["probabilities"]["normal/2_0"]
        entry["probabilities"]["normal/2_0"] = {"skip_connect": 0.75, "none": 0.25}
        assert row.keys() > {"skip_connect", "none"}
    write_run(tmp_path / "stage2", history)
    data = page_of(tmp_path / "stage2").data
    edge = [(e["cell"], e["name"]) for e in data["edges"]].index(("normal", "0 → 2"))
    given = dict(zip(data["operations"], data["alpha"][0][edge]))
    assert {name: p for name, p in given.items() if p is not None} == {"skip_connect": 0.75, "none": 0.25}
    assert data["margin"][0][edge] == 0.75


def test_a_search_in_stages_has_the_report_of_its_last_stage_and_its_own_genotype(tmp_path):
    for number in (1, 2, 10):
        write_run(tmp_path / f"stage{number}", make_history("agd", number, seed=number), about=ABOUT)
    (tmp_path / "stage11").mkdir()  # without an epoch yet
    page = page_of(tmp_path)
    assert page.data["epochs"] == list(range(1, 11))
    assert "Unfinished: 10 of 10 epochs of the search" in page.texts["verdict"]
    GENOTYPES["p_darts"].save(tmp_path / "genotype.json")
    page = page_of(tmp_path)
    assert "α and curves are those of stage10" in page.texts["verdict"]
    assert "changed" not in page.texts["verdict"]
    assert page.texts["retrain-command"].startswith(f"optinspired retrain {tmp_path}/genotype.json ")
    assert "stage10/history.json" in page.texts["provenance"]
    assert page_of(tmp_path / "stage2").data["epochs"] == [1, 2]


def write_retraining(folder, finished=True, **kwargs):
    """The folder of a retraining that no search is around; returns the files' contents."""
    folder.mkdir(parents=True)
    files = make_retrain(data={"classes": 10, "channels": 1}, mean=[0.3], std=[0.4], **kwargs)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    if finished:
        GENOTYPES["darts_v2"].save(folder / "genotype.json")
        (folder / "model.safetensors").touch()
    return files


def test_a_retraining_has_a_report(tmp_path):
    folder = tmp_path / "it's trained"
    write_retraining(folder, resumed=(1,))
    page = page_of(folder)
    verdict = page.texts["verdict"]
    assert verdict.strip().startswith("96.25 %")
    for text in ("Best: 97.50 % in epoch 2", "3,349,342without auxiliary head", "528,000,000one image", "Seed3"):
        assert text in verdict
    assert "Unfinished" not in verdict
    assert page.data["epochs"] == []
    assert page.data["curves"]["retrain"]["test_top1"] == [50.0, 97.5, 96.25]
    assert page.data["curves"]["retrain"]["resumed"] == [2]
    assert len([tag for tag, attrs in page.tags if attrs.get("class") == "drawing"]) == 2
    assert not {"controls", "history", "alpha", "retrain"} & page.attributes.keys()
    assert "channels36" in page.texts["provenance"]
    assert "version" not in page.texts["provenance"]
    call = page.texts["timm-call"].removeprefix("import timm\n\nmodel = ")
    name, arguments = re.fullmatch(r"timm\.create_model\('(\w+)', (.*)\)", call).groups()
    given = eval(f"dict({arguments})")
    files = dict(genotype=f"{folder}/genotype.json", checkpoint_path=f"{folder}/model.safetensors")
    assert (name, given) == ("cellnet_cifar", dict(cells=20, channels=36, num_classes=10, in_chans=1, **files))
    assert "mean [0.3] and the deviation [0.4]" in page.texts["usage"]


def test_a_retraining_that_has_just_begun_has_a_report(tmp_path):
    write_retraining(tmp_path / "run", finished=False, tests=(), epochs=5)
    page = page_of(tmp_path / "run")
    assert "no epoch yet" in page.texts["verdict"]
    assert "Unfinished: 0 of 5 epochs of the retraining." in page.texts["verdict"]
    assert not {"usage", "curves"} & page.attributes.keys()


def test_a_search_shows_how_to_use_the_network_of_its_retraining(tmp_path):
    write_run(tmp_path, make_history("hb", 1))
    write_retraining(tmp_path / "retrain")
    assert f"genotype='{tmp_path}/retrain/genotype.json'" in page_of(tmp_path).texts["timm-call"]
    assert "retrain/settings.json" in page_of(tmp_path).texts["provenance"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genotype": {}}, "settings.json: genotype has too many or too few fields"),
        ({"genotype": "darts_v2"}, "settings.json: genotype is a str: must be a JSON object"),
    ],
)
def test_a_damaged_retraining_is_named(tmp_path, change, message):
    settings = write_retraining(tmp_path / "run")["settings"]
    (tmp_path / "run" / "settings.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(tmp_path / "run")


def test_growing_skips_are_counted_in_words(tmp_path):
    first, second = make_history("agd", 2)
    first["genotype"]["normal"] = [[["sep_conv_3x3", 0], ["dil_conv_3x3", 1]]] * 4
    skips, mixed = [["skip_connect", 0], ["neg_skip_connect", 1]], [["skip_connect", 0], ["max_pool_3x3", 1]]
    second["genotype"]["normal"] = [skips, skips, skips, mixed]
    page = page_of(write_run(tmp_path / "run", [first, second]))
    assert "normal cell 0, then 7 of 8 edges" in page.texts["counts"]


def test_a_strategy_without_alpha_has_a_report(tmp_path):
    history = [{**entry, "probabilities": {}} for entry in make_history("agd", 2)]
    page = page_of(write_run(tmp_path / "run", history))
    assert "The strategy has no α" in page.texts["alpha"]
    assert page.data["edges"] == page.data["alpha"] == []
    assert len(page.data["counts"]["normal"]) == 2


def test_every_epoch_has_its_cells_and_the_last_ones_are_shown(tmp_path):
    history = make_history("hb", 5)
    page = page_of(write_run(tmp_path / "hb", history))
    drawn = {int(attrs["data-drawing"]): "hidden" in attrs for tag, attrs in page.tags if "data-drawing" in attrs}
    different = {(c, json.dumps(e["genotype"][c])) for e in history for c in ("normal", "reduction")}
    assert len(drawn) == len(different)
    assert sorted(number for number, hidden in drawn.items() if not hidden) == sorted(page.data["drawings"][-1])
    assert len([tag for tag, attrs in page.tags if attrs.get("class") == "drawing"]) == len(drawn)


def test_the_history_lists_what_changed_and_joins_what_did_not(tmp_path):
    entry = make_history("agd", 1)[0]
    entries = [json.loads(json.dumps({**entry, "epoch": epoch})) for epoch in range(5)]
    entries[4]["genotype"]["normal"][1] = [["skip_connect", 0], ["skip_connect", 2]]
    before = entry["genotype"]["normal"][1]
    page = page_of(write_run(tmp_path / "run", entries))
    rows = [(attrs["data-first"], attrs["data-last"]) for tag, attrs in page.tags if "data-first" in attrs]
    assert rows == [("1", "1"), ("2", "4"), ("5", "5")]
    old = ", ".join(f"{operation}({source})" for operation, source in before)
    assert f"normal node 3: {old} → skip_connect(0), skip_connect(2)" in page.texts["history"]


def test_versions_hashes_and_command(tmp_path):
    folder = tmp_path / "a run; rm"
    write_run(folder, make_history("hb", 1), about=ABOUT, settings={"data": "my $HOME.npz"}, retrain=make_retrain())
    page = page_of(folder)
    assert "channels36" in page.texts["provenance"]
    assert "version" not in page.texts["provenance"]  # the genotype among the settings: it has a hash
    expected = f"optinspired retrain '{folder}/genotype.json' --data 'my $HOME.npz' --seed 7"
    assert page.texts["retrain-command"] == expected
    assert "usage" not in page.texts, "its weights are not there yet"
    for text in ("nni3.0", "python3.11.7", "ab" * 32, "my $HOME.npz", *read_run(folder).hashes.values()):
        assert text in page.texts["provenance"]


def test_entropy_margin_and_strongest_leave_zero_out_where_a_genotype_does():
    row = {"skip_connect": 0.25, "sep_conv_3x3": 0.125, "none": 0.625}
    assert (strongest(row), margin(row)) == ("skip_connect", 0.125)
    assert margin({"skip_connect": 0.3, "none": 0.7}) == 0.3
    assert entropy([0.25] * 4) == pytest.approx(math.log(4))
    assert entropy([1.0, 0.0]) == 0


def test_changes_of_equal_genotypes_are_none():
    assert changes(GENOTYPES["darts_v2"], GENOTYPES["darts_v2"]) == []
    assert changes(GENOTYPES["darts_v2"], GENOTYPES["darts_v1"])[0] == (
        "normal node 3: sep_conv_3x3(0) → skip_connect(0)"
    )


# --- one file, of bounded size ----------------------------------------------------------------------------------------


def test_the_page_names_no_address_and_loads_nothing(tmp_path):
    source = write_report(write_run(tmp_path / "hb", make_history("agd", 2), about=ABOUT)).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=|<link", source.replace("// ", ""))
    policy = next(attrs["content"] for tag, attrs in Page(source).tags if tag == "meta" and "content" in attrs)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;'"


def hostile_run(folder):
    about = {"versions": {HOSTILE: HOSTILE}, "data": {HOSTILE: HOSTILE}}
    retrain = make_retrain(versions={HOSTILE: HOSTILE})
    retrain["settings"].update({HOSTILE: HOSTILE, "epochs": HOSTILE, "seed": HOSTILE})
    settings = {HOSTILE: HOSTILE, "data": HOSTILE, "seed": HOSTILE, "epochs": HOSTILE}
    return write_run(folder / "<b onload=x>", make_history("hb", 2), False, settings, about, retrain)


def test_hostile_text_is_text(tmp_path):
    page = page_of(hostile_run(tmp_path))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert not {"img", "b"} & set(tags)
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert page.texts["provenance"].count(HOSTILE) == 15  # 5 + 2 + 2 of the search, 4 + 2 of its retraining
    assert HOSTILE in page.texts["verdict"]


def test_no_tag_begins_in_embedded_data():
    text = embedded({HOSTILE: ["<!--<script>"]})
    assert "<" not in text
    assert json.loads(text) == {HOSTILE: ["<!--<script>"]}


def test_long_text_is_cut(tmp_path):
    settings = {"data": "x" * 100_000, **{f"k{i}": i for i in range(500)}}
    page = write_report(write_run(tmp_path / "run", make_history("hb", 1), settings=settings))
    assert "more" in Page(page.read_text(encoding="utf-8")).texts["provenance"]
    assert page.stat().st_size < 200_000


def test_fifty_epochs_stay_whole_and_what_is_too_much_is_thinned(tmp_path):
    folder = write_run(tmp_path / "run", make_history("agd", 50))
    path = write_report(folder)
    assert path.stat().st_size < 1_000_000
    assert Page(path.read_text(encoding="utf-8")).data["epochs"] == list(range(1, 51))
    small = render(read_run(folder), 150_000)
    assert len(small.encode()) <= 150_000
    page = Page(small)
    epochs = page.data["epochs"]
    assert 2 < len(epochs) < 50
    assert (epochs[0], epochs[-1]) == (1, 50)
    assert len(page.data["alpha"]) == len(page.data["drawings"]) == len(epochs)
    assert page.data["curves"]["search"]["epochs"] == list(range(1, 51))
    assert f"{50 - len(epochs)} epochs are left out, evenly" in page.texts["controls"]
    with pytest.raises(ValueError, match="limit=10000"):
        render(read_run(folder), 10_000)


def test_thinning_keeps_first_and_last():
    assert thinned(range(3), 5) == [0, 1, 2]
    assert thinned(range(101), 5) == [0, 25, 50, 75, 100]
    assert thinned(range(10), 2) == [0, 9]


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["settings.json", "history.json"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "run", make_history("hb", 1))
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        write_report(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", "{", "settings.json: Expecting"),
        ("settings.json", "[]", "settings.json: content is a list: must be a JSON object"),
        ("history.json", b"\xff", "history.json: 'utf-8' codec"),
        ("history.json", "[" * 100_000, "history.json: "),
        ("history.json", "{}", "content is a dict: must be a list"),
        ("history.json", "[]", "holds no epoch"),
        ("history.json", "[3]", "entry 0 is a int: must be a JSON object"),
        ("genotype.json", "{}", "genotype.json: genotype has too many or too few fields"),
        ("run.json", '{"parameters": "<b>"}', "run.json: parameters=<b>: must be an integer"),
        ("run.json", '{"versions": [1]}', "run.json: versions is a list"),
        ("retrain/run.json", '{"macs": -1}', "retrain/run.json: macs=-1: must be an integer"),
        ("retrain/history.json", '[{"epoch": 0, "test_top1": NaN}]', "test_top1=nan: must be a number from 0 to 100"),
        ("retrain/history.json", '[{"epoch": 0, "test_loss": "NaN"}]', "test_loss=NaN: must be a number"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    folder = write_run(tmp_path / "run", make_history("hb", 1), about=ABOUT, retrain=make_retrain())
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 0}, "entry 1, epoch=0: must be an integer above"),
        ({"epoch": True}, "epoch=True: must be an integer"),
        ({"resumed": 1}, "resumed=1: must be true or false"),
        ({"train_loss": "low"}, "epoch 1: train_loss=low: must be a number"),
        ({"seconds": 10**400}, "seconds=1000"),
        ({"genotype": {}}, "epoch 1: genotype has too many or too few fields"),
        ({"genotype": make_history("hb", 1, 3)[0]["genotype"], "probabilities": {}}, "another rule or number of nodes"),
        ({"probabilities": {}}, "other edges or operations"),
        ({"probabilities": {"normal/op_9_0": {}}}, "have 'normal/op_9_0': must be an edge of a cell of 4 nodes"),
        ({"probabilities": {"<b>": {}}}, "have '<b>': must be an edge"),
        ({"probabilities": {"normal/op_2_0": {"conv": 1}}}, "has operations 'conv': must be of sep_conv_3x3"),
        ({"probabilities": {"normal/op_2_0": {"none": 1}}}, "has operations 'none'"),
        ({"probabilities": {"normal/op_2_0": {"skip_connect": 2}}}, "'skip_connect'=2: must be a number from 0 to"),
        ({"probabilities": {"normal/beta_2": {"0": 1}}}, "normal/beta_2 has sources 0: must be 0 to 2"),
        ({"probabilities": {"normal/beta_2": {"0": 1, "1": 0, "2": 0}}}, "β of other edges than α"),
    ],
)
def test_a_damaged_epoch_is_named(tmp_path, change, message):
    first, second = make_history("hb", 2)
    folder = write_run(tmp_path / "run", [first, second])
    (folder / "history.json").write_text(json.dumps([first, {**second, **change}]))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        write_report(folder)
    assert "history.json: " in str(caught.value)


def test_reading_a_report_loads_no_host(tmp_path):
    folder = write_run(tmp_path / "run", make_history("hb", 1))
    out = tmp_path / "new" / "a.html"
    code = (
        f"import sys; from optinspired_plugins.report.page import write_report as w; w({str(folder)!r}, {str(out)!r})"
    )
    code += "; print({'torch', 'timm', 'nni', 'matplotlib'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "set()"
    assert out.exists()
