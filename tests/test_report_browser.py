"""The report in headless Chromium: its script runs, obeys the address and the keys, and nothing complains."""

import re
import shutil
import subprocess

import pytest
from report_runs import make_history, make_retrain, write_run
from test_report import HOSTILE, Page, hostile_run, write_retraining
from test_report_pages import write_seeds, write_trials

from optinspired_plugins.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed"),
]


@pytest.fixture
def browse(tmp_path):
    """Return a function that opens a page and gives the document as it is then, and what the console says."""

    def open_page(path, fragment=""):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]
        done = subprocess.run(
            [BROWSER, *options, path.as_uri() + fragment], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, re.findall(r"CONSOLE.*", done.stderr)

    return open_page


def shown(page):
    """The drawings that are not hidden."""
    found = [attrs for _, attrs in page.tags if "data-drawing" in attrs and "hidden" not in attrs]
    return [int(attrs["data-drawing"]) for attrs in found]


def test_the_console_would_tell(browse, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<!DOCTYPE html><script>document.title = 'ran'; missing();</script>")
    dom, console = browse(broken)
    assert "<title>ran</title>" in dom
    assert "missing is not defined" in console[0]


def test_the_script_runs_shows_the_last_epoch_and_draws(browse, tmp_path):
    retrain = make_retrain(resumed=(1,))
    folder = write_run(tmp_path / "run", make_history("agd", 6, resumed=(3,)), retrain=retrain)
    dom, console = browse(write_report(folder))
    assert console == []
    page = Page(dom)
    assert '<body data-epoch="6" data-ready="yes">' in dom
    assert shown(page) == page.data["drawings"][5]
    heat = [attrs for tag, attrs in page.tags if tag == "td" and "p" in attrs.get("class", "").split()]
    assert len(heat) == 28 * 9
    chosen = [attrs for attrs in heat if "chosen" in attrs["class"]]
    assert len(chosen) == 16
    squares = [attrs for tag, attrs in page.tags if tag == "rect" and "cell" in attrs.get("class", "")]
    bars = sum(len(count) for counts in page.data["counts"].values() for count in counts)
    assert len(squares) == 28 * 6 + bars
    lines = [attrs for tag, attrs in page.tags if attrs.get("class", "").startswith("trace")]
    assert len(lines) == 2 * 2 + 4 * 2
    assert not [attrs for attrs in lines if "NaN" in attrs["d"]]
    marks = [attrs for tag, attrs in page.tags if tag == "path" and attrs.get("class") == "resume"]
    assert len(marks) == 2 + 4


@pytest.mark.parametrize("rule", ["hb", "agd"])
def test_the_address_chooses_the_epoch(browse, tmp_path, rule):
    dom, console = browse(write_report(write_run(tmp_path / "run", make_history(rule, 6))), "#epoch=3")
    assert console == []
    page = Page(dom)
    assert page.texts["epoch"] == "3"
    assert 'data-epoch="3"' in dom
    assert shown(page) == page.data["drawings"][2] != page.data["drawings"][5]
    (row,) = [attrs for tag, attrs in page.tags if tag == "tr" and attrs.get("class") == "current"]
    assert row["data-first"] == "3"
    first = page.data["alpha"][2][0][0]
    assert f"{100 * first:.1f}" in re.findall(r'<td class="p[^>]*>([\d.]+)<', dom)[0]


def test_keys_buttons_slider_and_the_choice_of_colour_work(browse, tmp_path):
    path = write_report(write_run(tmp_path / "run", make_history("agd", 6)))
    script = """
      const log = [];
      const note = () => log.push(document.body.dataset.epoch);
      const key = (name) => {
        document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
        note();
      };
      const id = (name) => document.getElementById(name);
      key("ArrowRight"); key("ArrowLeft"); key("Home"); key("ArrowLeft"); key("End");
      id("back").click(); note();
      id("step").value = 1; id("step").dispatchEvent(new Event("input")); note();
      id("forth").click(); note();
      document.querySelector("#map-normal rect").dispatchEvent(new Event("click")); note();
      const squares = [...document.querySelectorAll("#map-normal .cell")];
      const fills = () => squares.map((square) => square.getAttribute("fill-opacity")).join();
      const before = fills();
      for (const name of ["entropy", "margin", "β", "none"]) {
        id("mode").value = name; id("mode").dispatchEvent(new Event("input"));
        log.push(fills() === before ? "same" : name);
      }
      document.body.dataset.log = log.join(" ");
      document.body.dataset.hash = location.hash;
      addEventListener("hashchange", () => { document.body.dataset.followed = document.body.dataset.epoch; });
      location.hash = "#epoch=4";
      const writeText = async (text) => { document.body.dataset.copied = text; };
      Object.defineProperty(navigator, "clipboard", {value: {writeText}});
      document.querySelector("#retrain .copy").click();
    """
    source = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))
    path.write_text(source.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    dom, console = browse(path)
    assert console == []
    assert 'data-log="6 5 1 1 6 5 2 3 1 entropy margin β none"' in dom
    assert 'data-hash="#epoch=1"' in dom
    assert 'data-followed="4"' in dom
    assert f'data-copied="{Page(dom).texts["retrain-command"]}"' in dom


def test_one_epoch_without_alpha_is_no_error(browse, tmp_path):
    history = [{**make_history("agd", 1)[0], "probabilities": {}}]
    del history[0]["train_loss"]
    dom, console = browse(write_report(write_run(tmp_path / "run", history, finished=False)))
    assert console == []
    assert 'data-ready="yes"' in dom


def test_a_retraining_draws_its_curves_and_its_call_can_be_copied(browse, tmp_path):
    write_retraining(tmp_path / "run", resumed=(1,))
    path = write_report(tmp_path / "run")
    script = """
      const writeText = async (text) => { document.body.dataset.copied = text.length; };
      Object.defineProperty(navigator, "clipboard", {value: {writeText}});
      document.querySelector("#usage .copy").click();
    """
    source = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))
    path.write_text(source.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    dom, console = browse(path)
    assert console == []
    page = Page(dom)
    assert 'data-ready="yes"' in dom
    assert f'data-copied="{len(page.texts["timm-call"])}"' in dom
    lines = [attrs for tag, attrs in page.tags if attrs.get("class", "").startswith("trace")]
    assert len(lines) == 4
    assert len(shown(page)) == 2


SAVE = """
  const files = [...document.querySelectorAll(".download")].map((link) => {
    link.addEventListener("click", (event) => event.preventDefault());
    link.click();
    const text = decodeURIComponent(link.href.slice("data:image/svg+xml,".length));
    const parsed = new DOMParser().parseFromString(text, "image/svg+xml");
    const alien = parsed.querySelector("parsererror, [class], style") ? "!" : "";
    const [, , width, height] = parsed.documentElement.getAttribute("viewBox").split(" ").map(Number);
    const words = [...parsed.querySelectorAll("text")].at(-1).textContent;
    return `${link.download} ${width > 100 && height > 50}${alien} ${words}`;
  });
  document.body.dataset.files = files.join(";");
  document.body.dataset.dashes = document.querySelectorAll('#cells div:not([hidden]) [data-kind~="start"]').length;
"""


def test_every_figure_can_be_saved_with_its_legend(browse, tmp_path):
    history = make_history("hb", 6, logit=2.5, step=0.1)
    path = write_report(write_run(tmp_path / "run", history, settings={"alpha_lr": 0.01}, about={"alpha_steps": 60}))
    source = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))
    path.write_text(source.replace("</body>", f"<script>{SAVE}</script></body>"), encoding="utf-8")
    dom, console = browse(path)
    assert console == []
    files = re.search('data-files="([^"]*)"', dom)[1].split(";")
    names = "normal.svg reduction.svg map-normal-cell.svg map-reduction-cell.svg certainty-entropy-of-softmax-α.svg"
    assert [file.split()[0] for file in files][:5] == names.split()
    assert len({file.split()[0] for file in files}) == len(files) == 10, "cells, maps, certainty, counts and curves"
    assert {file.split()[1] for file in files} == {"true"}
    assert files[0].endswith(" open or tied")
    assert files[-1].endswith(" α's half")
    assert int(re.search('data-dashes="([0-9]*)"', dom)[1]) >= 12


def test_kinds_follow_the_epoch(browse, tmp_path):
    path = write_report(write_run(tmp_path / "run", make_history("hb", 6, logit=2.0)))
    dom, console = browse(path, "#epoch=1")
    assert console == []
    first, last = ([*drawn[0], *drawn[1]] for drawn in (Page(dom).data["drawn"][i] for i in (0, -1)))
    shown = re.findall(r'<div data-drawing="\d+">(.*?)</svg>', dom, flags=re.DOTALL)
    assert re.findall('data-kind="([a-z]+)"', "".join(shown)) == first != last


@pytest.mark.parametrize("make", [write_seeds, lambda folder: write_trials(folder / "t", [1.0, None, 2.0])])
def test_pages_without_epochs_run(browse, tmp_path, make):
    dom, console = browse(write_report(make(tmp_path), tmp_path / "page.html"))
    assert console == []
    assert 'data-ready="yes"' in dom


def test_hostile_text_does_nothing(browse, tmp_path):
    dom, console = browse(write_report(hostile_run(tmp_path)))
    assert console == []
    assert "<title>owned" not in dom
    assert HOSTILE in Page(dom).texts["provenance"]


def test_the_policy_stops_what_is_not_the_pages_own(browse, tmp_path):
    path = write_report(write_run(tmp_path / "run", make_history("hb", 1)))
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace("</main>", f"{HOSTILE}</main>"), encoding="utf-8")
    dom, console = browse(path)
    assert "<title>owned" not in dom
    assert "Content Security Policy" in " ".join(console)
