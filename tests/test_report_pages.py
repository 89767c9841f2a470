"""The pages of genotypes, trials and several runs, and figures that can be saved."""

import json
import re
import xml.etree.ElementTree as ElementTree
from urllib.parse import unquote

import pytest
from report_runs import make_history, make_retrain, write_run
from test_report import HOSTILE, Page, page_of, write_retraining

from optinspired_plugins.cells.drawing import to_svg
from optinspired_plugins.cells.genotype import GENOTYPES, Genotype
from optinspired_plugins.report.comparison import agreement, by_chance
from optinspired_plugins.report.figures import Point, download, pareto_front, scatter
from optinspired_plugins.report.page import write_report
from optinspired_plugins.report.trials import parameters_of

SVG = "{http://www.w3.org/2000/svg}"


def files_of(source):
    """The figures that a page offers to save, as parsed XML, by name."""
    links = re.findall(r'<a class="download" download="([^"]+)" href="data:image/svg\+xml,([^"]+)">', source)
    return {name: ElementTree.fromstring(unquote(content)) for name, content in links}


def kinds_in(source):
    """The kinds of the edges of the drawings that a page shows."""
    shown = re.sub(r'<div data-drawing="\d+" hidden>.*?</svg></div>', "", source)
    return [kind for kinds in re.findall(r'<g class="[a-z]+" data-kind="([a-z ]+)"', shown) for kind in kinds.split()]


# --- a search: findings and files -------------------------------------------------------------------------------------

SCHEDULE = dict(settings={"epochs": 3, "alpha_lr": 0.01}, about={"alpha_steps": 60})


def test_a_search_that_found_nothing_says_so_first(tmp_path):
    history = make_history("hb", 3, logit=2.5, step=0.02)
    path = write_report(write_run(tmp_path, history, **SCHEDULE))
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    verdict = page.texts["verdict"].strip()
    assert verdict.startswith("This search has found nothing: of 24 edges, 8 open, 16 as at the start.")
    assert "Edges found0 of 248 open, 16 as at the start" in verdict
    assert "about 0.6 was possible" in verdict
    assert sorted(kinds_in(source)) == ["open"] * 8 + ["start"] * 16
    assert re.search(r"normal cell \d, then \d of 4 edges", page.texts["counts"])
    decided = [edge["cell"] for edge, start in zip(page.data["edges"], page.data["decided"]) if start]
    assert decided == ["normal"] * 8 + ["reduction"] * 8
    assert page.data["drawn"][-1] == [["open", "start", "start"] * 4] * 2


def test_findings_are_solid_and_no_warning_comes_first(tmp_path):
    path = write_report(write_run(tmp_path, make_history("hb", 3, logit=2.5, step=1.5), **SCHEDULE))
    source = path.read_text(encoding="utf-8")
    assert kinds_in(source).count("found") > 8
    assert "has found nothing" not in source
    assert '<p class="note first">' not in source


def test_without_recorded_alpha_no_kind_is_drawn(tmp_path):
    source = write_report(write_run(tmp_path, make_history("hb", 2))).read_text(encoding="utf-8")
    assert kinds_in(source) == []
    assert "Edges found" not in Page(source).texts["verdict"]


def test_the_cells_of_the_last_epoch_can_be_saved_without_a_script(tmp_path):
    source = write_report(write_run(tmp_path, make_history("hb", 3, logit=2.5), **SCHEDULE)).read_text(encoding="utf-8")
    files = files_of(source)
    assert files.keys() == {"normal.svg", "reduction.svg"}
    for drawing in files.values():
        assert len(drawing.findall(f"{SVG}g")) == 12
        assert "".join(drawing.itertext()).endswith("dotted: open or tied")
        assert float(drawing.get("height")) > 50


def test_a_saved_figure_holds_its_colours_and_no_address():
    link = download(to_svg(GENOTYPES["darts_v2"].normal, "a cell"), "cell.svg")
    assert not re.search(r"https?:|//[a-z]", link)
    (drawing,) = files_of(link).values()
    style = drawing.findtext(f"{SVG}style")
    assert ".sep path{stroke:#0072B2}" in style
    assert "var(" not in style


# --- genotypes --------------------------------------------------------------------------------------------------------


def test_a_published_genotype_has_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_report("darts_v2")
    assert path.resolve() == tmp_path / "darts_v2.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.texts["verdict"].strip().startswith("3,349,342 parameters")
    assert "4,718,752" in page.texts["verdict"]
    assert page.texts["retrain-command"] == "optinspired retrain darts_v2"
    assert page.texts["timm-call"].endswith("timm.create_model('cellnet_cifar', genotype='darts_v2')")
    assert "sep_conv_3x35" in page.texts["operations"]
    assert Genotype.from_json(page.texts["json"].partition("JSON")[2]) == GENOTYPES["darts_v2"]
    assert files_of(path.read_text(encoding="utf-8")).keys() == {"darts_v2-normal.svg", "darts_v2-reduction.svg"}


def test_a_genotypes_file_has_a_page_beside_it(tmp_path):
    GENOTYPES["p_darts"].save(tmp_path / "my cell.json")
    page = Page(write_report(tmp_path / "my cell.json").read_text(encoding="utf-8"))
    assert (tmp_path / "my cell.html").exists()
    assert page.texts["retrain-command"] == f"optinspired retrain '{tmp_path}/my cell.json'"
    assert f"genotype='{tmp_path}/my cell.json'" in page.texts["timm-call"]


def test_a_hostile_name_of_a_file_is_text(tmp_path):
    path = tmp_path / "a\" onclick='b()' <img>.json"
    GENOTYPES["p_darts"].save(path)
    page = Page(write_report(path).read_text(encoding="utf-8"))
    assert "img" not in {tag for tag, _ in page.tags}
    (normal, reduction) = [attrs for tag, attrs in page.tags if attrs.get("class") == "download"]
    assert normal["download"] == "a\" onclick='b()' <img>-normal.svg"
    assert normal.keys() == reduction.keys() == {"class", "download", "href"}


def test_an_unknown_source_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"source='darts_v9': must be the folder of a run, .* or one of darts_v1"):
        write_report("darts_v9")


# --- trials -----------------------------------------------------------------------------------------------------------

SIZES = dict(cells=8, channels=16, nodes=4, num_classes=10, in_chans=3, stem="cifar")


def write_trials(folder, metrics, **settings):
    """Trials with these results, ``None`` for a failed one, of the published genotypes in turn."""
    genotypes = list(GENOTYPES.values())
    trials = [
        {
            "index": i,
            "genotype": genotypes[i % len(genotypes)].to_dict(),
            "metric": metric,
            "intermediate": [],
            "seconds": 60.0,
            "error": None if metric is not None else f"RuntimeError: {HOSTILE}",
        }
        for i, metric in enumerate(metrics)
    ]
    settings = {"space": "DARTSSpace", "strategy": "Random", "seed": 3, "data": "digits", **SIZES, **settings}
    folder.mkdir(exist_ok=True)
    (folder / "trials.json").write_text(json.dumps({"settings": settings, "trials": trials}))
    return folder


def test_trials_have_a_page_with_their_pareto_front(tmp_path):
    path = write_report(write_trials(tmp_path / "trials", [90.5, None, 93.25, 91.0, 88.0]))
    page = Page(path.read_text(encoding="utf-8"))
    verdict = page.texts["verdict"].strip()
    assert verdict.startswith("93.25")
    assert "Result of trial 2, the best of 4. It was chosen by this number" in verdict
    assert "Trials51 without a result; 5 min 0 s" in verdict
    points = re.findall(r'<a href="#(trial-\d)"><title>[^<]*</title><circle class="dot (\w+)', path.read_text("utf-8"))
    assert sorted(name for name, _ in points) == ["trial-0", "trial-2", "trial-3", "trial-4"]
    sizes = {i: parameters_of(list(GENOTYPES.values())[i], SIZES) for i in (0, 2, 3, 4)}
    metrics = {0: 90.5, 2: 93.25, 3: 91.0, 4: 88.0}
    front = {i for i in sizes if not any(sizes[k] <= sizes[i] and metrics[k] > metrics[i] for k in sizes)}
    assert {name for name, look in points if look == "front"} == {f"trial-{i}" for i in front}
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "tr" and "id" in attrs]
    assert ids == ["trial-2", "trial-3", "trial-0", "trial-4", "trial-1"]
    assert f"1 min 0 sRuntimeError: {HOSTILE}" in page.texts["trials"]
    assert page.texts["retrain-command"].startswith(
        f"optinspired retrain {tmp_path}/trials/genotype.json --data digits"
    )
    assert files_of(path.read_text("utf-8")).keys() == {
        "parameters-and-results.svg",
        "best-normal.svg",
        "best-reduction.svg",
    }


def test_trials_of_unknown_size_and_trials_without_result_have_a_page(tmp_path):
    page = page_of(write_trials(tmp_path / "a", [1.0, 1.0], channels="many"))
    assert "pareto" not in page.texts
    assert "not known" in page.texts["trials"]
    assert page_of(write_trials(tmp_path / "b", [None])).texts["verdict"].strip().startswith("no result")
    for wrong in ({"cells": 2}, {"cells": 10**9}, {"stem": "mobile"}, {"in_chans": True}):
        assert parameters_of(GENOTYPES["darts_v2"], {**SIZES, **wrong}) is None


def test_the_pareto_front_has_no_point_that_another_exceeds():
    points = [Point(*values, "", "") for values in ((3, 5.0), (1, 2.0), (2, 2.0), (2, 4.0), (4, 5.0), (4, 9.0))]
    assert [(p.parameters, p.result) for p in pareto_front(points)] == [(1, 2.0), (2, 4.0), (3, 5.0), (4, 9.0)]


@pytest.mark.parametrize("results", [[5.0], [96.0, 96.00000000000001], [-1e15, 1e15], [0.0, 0.0]])
def test_any_results_have_an_axis(results):
    svg = scatter([Point(10 + i, result, "a", "b") for i, result in enumerate(results)], "result")
    assert "nan" not in svg
    assert len(re.findall("<circle", svg)) == len(results)
    ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": 1}, "trials.json: trial 0: index=1: must be 0"),
        ({"metric": float("nan")}, "trial 0: metric=nan: must be a finite number or null"),
        ({"error": "no"}, "trial 0: error='no': must be there if there is no metric"),
        ({"seconds": -1}, "trial 0: seconds=-1: must be a number from 0"),
        ({"genotype": {}}, "trial 0: genotype has too many or too few fields"),
    ],
)
def test_damaged_trials_are_named(change, message, tmp_path):
    path = write_trials(tmp_path / "trials", [1.0]) / "trials.json"
    content = json.loads(path.read_text())
    content["trials"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(path.parent)


# --- several runs -----------------------------------------------------------------------------------------------------


def test_edges_with_places_agree_at_their_place():
    a = Genotype(
        "hb",
        [[("sep_conv_3x3", 1), ("skip_connect", 1), ("max_pool_3x3", 0)]],
        [[("skip_connect", s) for s in (1, 1, 0)]],
    )
    b = Genotype("hb", [[("skip_connect", 1), ("skip_connect", 1), ("max_pool_3x3", 0)]], a.reduction)
    for marks in agreement([a, b, b]):
        assert marks == {"normal": [False, True, True], "reduction": [True, True, True]}
    assert by_chance([a, b]) == pytest.approx(6 / 8)
    assert by_chance([a, b, b]) == pytest.approx(6 / 64)


def test_edges_that_a_search_chooses_agree_in_any_order():
    a = Genotype("agd", [[("sep_conv_3x3", 0), ("skip_connect", 1)]], [[("skip_connect", 0), ("skip_connect", 0)]])
    b = Genotype("agd", [[("skip_connect", 1), ("sep_conv_5x5", 0)]], [[("skip_connect", 1), ("skip_connect", 0)]])
    assert agreement([a, b]) == [
        {"normal": [False, True], "reduction": [True, False]},
        {"normal": [True, False], "reduction": [False, True]},
    ]
    assert by_chance([a, b]) == pytest.approx(2 * 2 / 8), "both nodes have both sources, and one operation of eight"
    node = [("sep_conv_3x3", 0), ("skip_connect", 1)]
    same = Genotype("agd", [node, node], [node, node])
    assert by_chance([same, same]) == pytest.approx(2 * (4 / 16 + 4 / 24)), "equal sources may have been chosen"


def write_seeds(folder):
    for seed in (0, 1):
        retrain = make_retrain(tests=(50.0, 95.0 + seed))
        history = make_history("hb", 3, seed=seed, logit=2.5, step=0.3)
        settings = {**SCHEDULE["settings"], "seed": seed}
        write_run(
            folder / f"seed{seed}",
            history,
            settings=settings,
            about=SCHEDULE["about"],
            retrain=retrain,
        )
    return [folder / "seed0", folder / "seed1"]


def test_seeds_are_beside_each_other(tmp_path):
    path = write_report(write_seeds(tmp_path), tmp_path / "both.html")
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    genotypes = [Genotype.load(tmp_path / f"seed{seed}" / "genotype.json") for seed in (0, 1)]
    count = sum(sum(flags) for flags in agreement(genotypes)[0].values())
    assert 0 < count < 24
    verdict = page.texts["verdict"].strip()
    assert verdict.startswith(f"{count} of 24 edges agree")
    assert "as many random cells share 3 on average" in verdict
    assert "of them are as at the start in every run" in verdict
    assert "Mean result95.50 ± 0.71 %on test images, after retraining; the runs differ in seed" in verdict
    assert kinds_in(source).count("shared") == 2 * count
    assert page.texts["edges"].count("✓") == 2 * count + 1  # and once in the explanation
    assert len(files_of(source)) == 4
    for text in ("seed0", "seed1", "96.00 %", "as at the start"):
        assert text in page.texts["runs"]
    assert "seed" in page.texts["differences"]
    assert "epochs" not in page.texts["differences"]


def test_all_kinds_of_runs_are_compared_and_other_rules_have_no_agreement(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "agd", make_history("agd", 2))
    write_retraining(tmp_path / "trained")
    page = Page(write_report([tmp_path / "agd", tmp_path / "trained", "darts_v2"]).read_text(encoding="utf-8"))
    assert (tmp_path / "comparison.html").exists()
    assert "of 16 edges agree" in page.texts["verdict"]
    assert "Mean result" not in page.texts["verdict"]
    write_run(tmp_path / "hb", make_history("hb", 2))
    page = Page(write_report([tmp_path / "agd", tmp_path / "hb"]).read_text(encoding="utf-8"))
    assert page.texts["verdict"].strip().startswith("2 runs")
    assert "no counterpart" in page.texts["verdict"]
    assert "edges" not in page.attributes


def test_what_cannot_be_compared_is_named(tmp_path):
    trials = write_trials(tmp_path / "trials", [1.0])
    with pytest.raises(ValueError, match="holds trials, which have a page of their own"):
        write_report([trials, "darts_v2"])
    with pytest.raises(ValueError, match="sources has 25 runs: must be at most 24"):
        write_report(["darts_v2"] * 25)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("make", [lambda f: write_trials(f / "t", [1.0, 2.0]), write_seeds, lambda f: "darts_v2"])
def test_no_page_names_an_address(make, tmp_path):
    source = write_report(make(tmp_path), tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=|<link", source.replace("// ", ""))
