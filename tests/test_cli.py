"""The command, as a user runs it: in a process of its own, from another folder."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_runs import make_history, write_run

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
TINY = ["--pairs", "40", "--dimension", "3", "--batch-size", "10"]


def command(*arguments):
    return [sys.executable, "-m", "optinspired_plugins.cli", *map(str, arguments)]


def environment(**variables):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "OMP_NUM_THREADS": "1", **variables}


def run(*arguments, folder, ok=True, **variables):
    env = environment(**variables)
    done = subprocess.run(command(*arguments), cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def test_simulate_trains_prints_and_goes_on(tmp_path):
    options = ["simulate", "--out", "sim", "--depths", "2,3", "--steps", "4", *TINY]
    first = run(*options, "--seeds", "0", folder=tmp_path).stdout
    assert len(re.findall(r"MSE [\d.]+  [\d.]+ s", first)) == 10
    assert re.search(r"agd2\s+3\s+[\d.]+\s+one seed", first)
    second = run(*options, "--seeds", "0,1", folder=tmp_path).stdout
    assert second.count("(from the file)") == 10
    assert {p.name for p in (tmp_path / "sim").iterdir()} == {"table2.csv", "table2.md", "table2.png"}
    assert len((tmp_path / "sim" / "table2.csv").read_text().splitlines()) == 21


def test_a_killed_simulation_goes_on(tmp_path):
    options = ["simulate", "--out", "sim", "--depths", "2", "--networks", "gd,hb", "--seeds", "0,1,2"]
    options += ["--steps", "300", *TINY]
    process = subprocess.Popen(command(*options), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    table = tmp_path / "sim" / "table2.csv"
    deadline = time.monotonic() + 120
    while not table.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(table.read_text().splitlines()) - 1
    assert run(*options, folder=tmp_path).stdout.count("(from the file)") == kept > 0
    assert len(table.read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "newton"], "network='newton': must be one of gd, hb, agd, agd2, admm"),
        (["--depths", "0"], "depth=0: must be an integer ≥ 1"),
        (["--depths", "ten"], "must be integers separated by commas"),
        (["--lr", "-1"], "lr=-1.0: must be a positive number"),
    ],
)
def test_wrong_options_are_a_message_and_no_traceback(tmp_path, arguments, message):
    done = run("simulate", *arguments, folder=tmp_path, ok=False)
    assert done.returncode == 2
    assert message in re.sub(r"\s*│\s*\n?\s*│?\s*", " ", done.stdout + done.stderr)
    assert "Traceback" not in done.stdout + done.stderr


def test_plots_are_written(tmp_path):
    for arguments in (["algorithms"], ["convergence", "--steps", "30"], ["algorithm", "dmrnet", "--out", "new/d.svg"]):
        printed = run("plot", *arguments, folder=tmp_path).stdout.strip()
        assert (tmp_path / printed).stat().st_size > 5_000


def test_a_report_and_its_cells_are_written(tmp_path):
    write_run(tmp_path / "hb[1]", make_history("hb", 2))
    assert run("report", "hb[1]", folder=tmp_path).stdout == "Report: hb[1]/report.html\n"
    run("report", "hb[1]", "--out", "pages/a.html", folder=tmp_path)
    assert (tmp_path / "pages" / "a.html").read_bytes() == (tmp_path / "hb[1]" / "report.html").read_bytes()
    for genotype in ("hb[1]/genotype.json", "darts_v2"):
        run("plot", "cells", genotype, "--out", "cells.svg", folder=tmp_path)
        assert (tmp_path / "cells.svg").stat().st_size > 5_000


def test_a_damaged_run_is_a_message_and_no_traceback(tmp_path):
    write_run(tmp_path / "run", make_history("hb", 1), about={"parameters": "[/red]"})
    done = run("report", "run", folder=tmp_path, ok=False)
    assert "run/run.json: parameters=[/red]: must be an integer from 0 to 1e+15" in done.stdout
    done = run("report", "nothing", folder=tmp_path, ok=False)
    assert "nothing/settings.json" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_users_algorithm_is_drawn_from_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "examples" / "my_algorithms.py").read_text(encoding="utf-8"))
    run("plot", "algorithm", "mine:OptimizedGradient", "--out", "mine.png", folder=tmp_path)
    assert (tmp_path / "mine.png").stat().st_size > 5_000
    refused = run("plot", "algorithm", "mine:LearnedHeavyBall", folder=tmp_path, ok=False)
    assert "multiplies an iterate by a Parameter, not by a number" in refused.stdout.replace("\n", " ")


def test_without_its_extra_the_command_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('no typer here')")
    done = run("--help", folder=tmp_path, ok=False, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert "needs the extra 'viz'" in done.stderr
    assert "Traceback" not in done.stderr
