"""Noise and findings of a search: the definition on a few recorded α, and the words of pages and lines."""

import json
import math
from pathlib import Path

import pytest
from extras import needs
from report_runs import make_history, write_run

from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.report import texts
from optinspired_plugins.report.files import read_epochs
from optinspired_plugins.report.findings import distances, findings, kind_of, lead, strongest
from optinspired_plugins.report.runs import EdgeKey, SearchEpoch, SearchRun

SEP, POOL, SKIP, NEG = "sep_conv_3x3", "max_pool_3x3", "skip_connect", "neg_skip_connect"
FIRST = EdgeKey("normal", 2, 1, 0)


def softmax(row):
    total = sum(math.exp(value) for value in row.values())
    return {name: math.exp(value) / total for name, value in row.items()}


def search_of(start, *epochs, settings=None, about=None):
    """A search with one node whose first edge has these α; the other two stay at the heavy ball."""
    others = {EdgeKey("normal", 2, 1, 1): {SKIP: 2.0, SEP: 0.0}, EdgeKey("normal", 2, 0, 2): {NEG: 2.0, SEP: 0.0}}
    history = []
    for number, row in enumerate(epochs, start=1):
        logits = {FIRST: row, **others}
        logits |= {key._replace(cell="reduction"): {SKIP: 2.0, SEP: 0.0} for key in logits}
        node = ((strongest(row), 1), (SKIP, 1), (NEG, 0))
        genotype = Genotype("hb", (node,), (((SKIP, 1), (SKIP, 1), (SKIP, 0)),))
        alpha = {key: softmax(each) for key, each in logits.items()}
        history.append(SearchEpoch(number, {}, False, genotype, alpha, {}, logits))
    first = None if start is None else {**history[0].logits, FIRST: start}
    return SearchRun(Path("run"), None, settings or {}, about or {}, history, first, None, None, {})


# --- one edge ---------------------------------------------------------------------------------------------------------


def test_lead_and_distances_leave_zero_out_where_a_genotype_does():
    row = {SEP: 0.5, SKIP: 0.2, "none": 3.0}
    assert lead(row) == pytest.approx(0.3)
    assert lead({SEP: 0.5, "none": 0.5}) == math.inf
    assert distances({SEP: 0.0, SKIP: 0.5, "none": 3.0}, row) == pytest.approx([0.5, 0.3, 0.0])


@pytest.mark.parametrize(
    ("edge_lead", "is_start", "way", "kind"),
    [
        (0.0, True, 0.1, "tie"),
        (1e-6, False, None, "tie"),
        (2.0, True, 5.0, "start"),
        (0.2, False, 0.1, "open"),
        (0.21, False, 0.1, "found"),
        (0.01, False, None, "found"),
    ],
)
def test_the_kind_of_an_edge(edge_lead, is_start, way, kind):
    assert kind_of(edge_lead, is_start, way) == kind


FAVOURED, RANDOM = {SKIP: 2.0, SEP: 0.0, POOL: 0.0}, {SEP: 2e-3, SKIP: 0.0, POOL: 1e-3}


@pytest.mark.parametrize(
    ("start", "epochs", "kind"),
    [
        (FAVOURED, [{SKIP: 1.9, SEP: 0.1, POOL: 0.0}], "start"),
        (FAVOURED, [{SKIP: 0.1, SEP: -0.4, POOL: -0.4}], "start"),  # it fell, by less than its lead
        (FAVOURED, [{SKIP: 0.5, SEP: 1.5, POOL: 0.0}], "found"),
        (FAVOURED, [{SKIP: 4.5, SEP: 0.0, POOL: 0.0}], "found"),  # α itself led to the operation of the start
        (FAVOURED, [{SKIP: 1.0, SEP: 1.4, POOL: 0.0}, {SKIP: 1.5, SEP: 1.0, POOL: 0.0}], "found"),  # left and returned
        (FAVOURED, [{SKIP: 1.0, SEP: 1.15, POOL: 0.0}], "open"),
        (RANDOM, [RANDOM], "start"),
        (RANDOM, [{SEP: 0.8, SKIP: 0.1, POOL: 0.0}], "found"),  # chance began it, and α went on
        (RANDOM, [{SEP: 0.0, SKIP: 0.12, POOL: 0.0}], "open"),
        ({SKIP: 0.0, SEP: 0.0}, [{SKIP: 0.3, SEP: 0.3}], "tie"),
        ({SKIP: 0.0}, [{SKIP: 0.4}], "start"),  # one candidate
    ],
)
def test_the_kind_follows_from_start_and_epochs(start, epochs, kind):
    """In an epoch α goes 0.1: 10 steps of 0.01."""
    settings, about = dict(epochs=len(epochs), alpha_lr=0.01), dict(alpha_steps=10 * len(epochs))
    found = findings(search_of(start, *epochs, settings=settings, about=about))[-1]
    assert found.kinds[FIRST] == kind
    assert (FIRST in found.decided) == (kind == "start")
    assert {found.kinds[key] for key in found.kinds if key != FIRST} == {"start"}


# --- a search ---------------------------------------------------------------------------------------------------------


def test_the_way_of_alpha_and_how_far_it_went():
    start, epochs = {SKIP: 0.0, SEP: 0.0}, [{SKIP: 0.0, SEP: 0.0}, {SKIP: 0.3, SEP: -0.1}]
    settings, about = dict(epochs=4, warmup_epochs=1, alpha_lr=0.01), dict(alpha_steps=90)
    still, moved = findings(search_of(start, *epochs, settings=settings, about=about))
    assert (still.steps, still.reach, still.farthest) == (0, 0, 0)
    assert (moved.steps, moved.reach) == (30, pytest.approx(0.3))
    assert (moved.farthest, moved.median) == (pytest.approx(0.3), 0)  # of 12 numbers 10 did not move
    assert moved.moved[FIRST] == pytest.approx(0.3)
    assert texts.moved(moved) == ("α has moved by at most 0.3 (median 0); it could move by about 0.3 in 30 steps")


@pytest.mark.parametrize("wrong", [{"alpha_lr": "fast"}, {"epochs": True}, {"epochs": 0}, {"warmup_epochs": 10**400}])
def test_settings_of_a_file_may_be_anything(wrong):
    settings = {"epochs": 1, "alpha_lr": 0.01, **wrong}
    (found,) = findings(search_of({SKIP: 0.0, SEP: 0.0}, {SKIP: 0.01, SEP: 0.0}, settings=settings))
    assert found.reach is None
    assert found.kinds[FIRST] == "found"
    assert "could" not in texts.moved(found)


def test_skips_of_the_start_were_not_chosen():
    (found,) = findings(search_of(RANDOM, {SKIP: 0.8, SEP: 0.0, POOL: 0.0}))
    assert found.skips() == found.skips("normal") == (1, 1)
    assert found.skips("reduction") == (0, 0)
    assert found.counts() == {"found": 1, "start": 5}
    assert texts.counted(found.counts()) == "1 found, 5 as at the start"


def test_without_a_recorded_start_nothing_is_said():
    row = {SKIP: 0.8, SEP: 0.0}
    assert findings(search_of(None, row, row)) == [None, None]


def test_edges_of_equal_weight_are_tied_though_their_operations_are_not(tmp_path):
    """Which two of three sources a node has is then decided by their order."""
    rows = {f"{cell}/{t}_{i}": {SEP: 0.4, SKIP: 0.0} for cell in ("normal", "reduce") for t in (2, 3) for i in range(t)}
    rows["normal/3_0"] = {SEP: 0.9, SKIP: 0.0}
    cell = [[[SEP, 0], [SEP, 1]], [[SEP, 0], [SEP, 1]]]
    genotype = {"version": 1, "rule": "agd", "normal": cell, "reduction": cell}
    entry = {"epoch": 0, "genotype": genotype, "logits": rows, "seconds": 1.0, "resumed": False}
    entry["probabilities"] = {label: softmax(row) for label, row in rows.items()}
    entry["start_logits"] = {label: {SEP: 0.0, SKIP: 0.0} for label in rows}
    (found,) = findings(read_epochs(write_run(tmp_path, [entry], finished=False)))
    kinds = {key[:3]: kind for key, kind in found.kinds.items()}
    assert kinds["normal", 2, 0] == kinds["normal", 2, 1] == kinds["normal", 3, 0] == "found"
    assert kinds["normal", 3, 1] == kinds["reduction", 3, 1] == "tie"


# --- words ------------------------------------------------------------------------------------------------------------

SCHEDULE = dict(settings={"epochs": 3, "alpha_lr": 0.01}, about={"alpha_steps": 60})


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (0.4, ""),
        (0.02, "This search has found nothing: of 24 edges, 8 open, 16 as at the start."),
        (0.0, "α has not moved: this cell is the start of the search, not a result."),
    ],
)
def test_a_search_that_found_nothing_says_so(step, words, tmp_path):
    run = read_epochs(write_run(tmp_path, make_history("hb", 3, logit=2.5, step=step), **SCHEDULE))
    assert texts.nothing_found(findings(run)[-1]).startswith(words)
    assert bool(texts.nothing_found(findings(run)[-1])) == bool(words)


def test_the_line_of_an_epoch_has_the_way_of_alpha_and_its_findings(tmp_path):
    needs("typer")
    from nni_spaces.cli import _summary, search_line

    history = make_history("hb", 3, logit=2.5, step=0.02)
    write_run(tmp_path, history, settings=SCHEDULE["settings"], about={**SCHEDULE["about"], "logit": 2.5})
    found = findings(read_epochs(tmp_path))[-1]
    skips, chosen = found.skips()
    line = search_line(tmp_path, history[-1])
    assert f"  moved {found.farthest:.2g} of 0.6  found 0/24  skips {skips}/{chosen}" in line
    assert chosen == 8
    assert search_line(tmp_path, {**history[-1], "alpha_loss": None}).endswith("%  α stands still")
    write_run(tmp_path / "old", make_history("hb", 3))
    assert search_line(tmp_path / "old", history[-1]).endswith(f"α {history[-1]['alpha_loss']:.3f}  31.9 %")
    assert _summary(tmp_path / "old") == []
    moved, edges = _summary(tmp_path)
    assert moved == f"{texts.moved(found)}; the favoured began at 2.5."
    assert edges == texts.nothing_found(found)


def test_an_epoch_without_an_edge_of_its_genotype_is_named(tmp_path):
    (entry,) = make_history("hb", 1, logit=2.5)
    for name in ("probabilities", "logits", "start_logits"):
        del entry[name]["normal/op_3_2"]
    folder = write_run(tmp_path, [entry])
    with pytest.raises(ValueError, match="probabilities lack 1 → 3 of the normal cell: must have every edge"):
        read_epochs(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": {}}, "logits have other edges or operations than probabilities"),
        ({"start_logits": {"normal/op_9_0": {}}}, "start_logits have 'normal/op_9_0': must be an edge"),
        ({"start_logits": []}, "start_logits is a list: must be a JSON object"),
        ({"logits": {"normal/op_2_0": {SKIP: math.inf}}}, "'skip_connect'=inf: must be a number from -1e"),
    ],
)
def test_damaged_logits_are_named(change, message, tmp_path):
    (entry,) = make_history("hb", 1, logit=2.5)
    folder = write_run(tmp_path, [entry])
    (folder / "history.json").write_text(json.dumps([{**entry, **change}]))
    with pytest.raises(ValueError, match=message):
        read_epochs(folder)
