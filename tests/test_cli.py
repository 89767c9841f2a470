"""The command, as a user runs it: in a process of its own, from another folder.

``cold``: with the imports of a fresh Python.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import warm
from extras import needs
from report_runs import make_history, write_run
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
TINY = ["--pairs", "40", "--dimension", "3", "--batch-size", "10"]


def command(*arguments):
    return [sys.executable, "-m", "optinspired_plugins.cli", *map(str, arguments)]


def environment(**variables):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "OMP_NUM_THREADS": "1", **variables}


def run(*arguments, folder, ok=True, cold=False, **variables):
    env = environment(**variables)
    if cold:
        done = subprocess.run(command(*arguments), cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    else:
        done = warm.run(command(*arguments)[1:], cwd=folder, env=env)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def test_simulate_trains_prints_and_goes_on(tmp_path):
    options = ["simulate", "--out", "sim", "--depths", "2,3", "--steps", "4", *TINY]
    first = run(*options, "--seeds", "0", folder=tmp_path, cold=True).stdout
    assert len(re.findall(r"MSE [\d.]+  [\d.]+ s", first)) == 10
    assert re.search(r"agd2\s+3\s+[\d.]+\s+one seed", first)
    second = run(*options, "--seeds", "0,1", folder=tmp_path).stdout
    assert second.count("(from the file)") == 10
    assert {p.name for p in (tmp_path / "sim").iterdir()} == {
        ".table2.csv.lock", "table2.csv", "table2.md", "table2.png"
    }  # fmt: skip
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


def test_a_wrong_option_is_a_line_on_stderr_and_no_traceback(tmp_path):
    """test_command_line.py has a table of them."""
    done = run("simulate", "--depths", "0", folder=tmp_path, ok=False)
    assert (done.returncode, done.stderr) == (1, "error ValueError: depth=0: must be an integer ≥ 1\n")


def test_a_search_in_stages_shows_them(tmp_path):
    needs("nni")
    options = "--data digits --limit 40 --batch-size 16 --channels 2 --nodes 1 --epochs 2 --warmup-epochs 1 --padding 0"
    options = ["search", "--out", "run", "--strategy", "p-darts", "--accelerator", "cpu", *options.split()]
    first = run(*options, folder=tmp_path).stdout
    assert first.count("α stands still") == len(re.findall(r"α \d\.\d+", first)) == 3
    assert {p.name for p in (tmp_path / "run").glob("[!.]*")} == {"genotype.json", "stage1", "stage2", "stage3"}
    carried = "--data digits --limit 40 --padding 0 --accelerator cpu --batch-size 40"
    assert f"Train it: optinspired retrain {tmp_path}/run/genotype.json {carried}\n" in first
    run("report", "run", folder=tmp_path)
    assert "those of stage3" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("space", "nodes"), [("hb", set()), ("darts", {"2", "3"})])
def test_partial_channels_are_searched(space, nodes, tmp_path):
    needs("nni")
    options = "--data digits --limit 40 --batch-size 16 --channels 4 --cells 3 --nodes 2 --epochs 4 --padding 0"
    options = ["search", "--out", "run", "--strategy", "pc-darts", "--accelerator", "cpu", *options.split()]
    first = run(*options, "--space", space, folder=tmp_path).stdout
    assert first.count("α stands still") == 1
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    beta = {label[-1]: p for label, p in history[-1]["probabilities"].items() if label.startswith("normal/beta_")}
    assert beta.keys() == nodes
    assert all(len(set(p.values())) > 1 for p in beta.values()), "β has moved"
    run("report", "run", folder=tmp_path)


def test_the_command_that_a_search_ends_with_trains_a_network_for_timm(tmp_path):
    needs("nni")
    shared = ["--limit", "40", "--batch-size", "16", "--epochs", "2", "--cells", "3", "--accelerator", "cpu"]
    options = ["--init", "heavy-ball", "--data", "digits", "--channels", "2", "--nodes", "2", *shared]
    options += ["--alpha-lr", "0.1", "--grad-checkpointing"]
    searched = run("search", "--out", "my runs/hb", *options, folder=tmp_path, cold=True)
    history = json.loads((tmp_path / "my runs" / "hb" / "history.json").read_text())
    line = r"%  moved ([\d.]+) of ([\d.]+)  found \d/12  skips \d/4 "
    (moved, reach), (later, whole) = re.findall(line, searched.stdout)
    assert float(whole) == pytest.approx(2 * float(reach), rel=0.1)
    assert all(0 < float(way) <= 1.05 * float(limit) for way, limit in ((moved, reach), (later, whole)))
    assert {edge["skip_connect"] for edge in history[0]["start_logits"].values()} > {0.0}
    assert re.search("^α has moved by at most .*; the favoured began at 2.1.$", searched.stdout, flags=re.MULTILINE)
    assert re.search("12 edges, .*8 as at the start", searched.stdout)
    (line,) = re.findall("^Train it: optinspired (.*)$", searched.stdout, flags=re.MULTILINE)
    trained = run(*shlex.split(line), "--channels", "2", "--cutout", "2", *shared, folder=tmp_path, cold=True)
    assert searched.stderr + trained.stderr == ""  # the hosts' advice is not for a terminal
    folder = tmp_path / "my runs" / "hb"
    assert json.loads((folder / "settings.json").read_text())["grad_checkpointing"] is True
    *_, entry = json.loads((folder / "retrain" / "history.json").read_text())
    assert f"Test accuracy after the last epoch: {entry['test_top1']:.2f} %" in trained.stdout
    assert json.loads((folder / "retrain" / "settings.json").read_text())["aux_weight"] == 0  # 8 × 8
    options = dict(genotype=str(folder / "genotype.json"), cells=3, channels=2, in_chans=1)
    model = timm.create_model("cellnet_cifar", **options)
    model.load_state_dict(load_file(folder / "retrain" / "model.safetensors"))
    again = run(*shlex.split(line), "--channels", "3", "--cutout", "2", *shared, folder=tmp_path, ok=False)
    assert "holds a run with channels=2 (here 3): choose another folder" in again.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_stopped_search_says_so_and_has_not_finished(tmp_path, number, status):
    """Its status stops ``search && retrain``."""
    needs("nni")
    options = "--data digits --limit 96 --batch-size 16 --channels 2 --cells 3 --nodes 1 --epochs 1000"
    options += " --accelerator cpu"
    search = command("search", "--out", "run", *options.split())
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # A shell's background jobs, and what they start, ignore interrupts.
    process = subprocess.Popen(
        search, cwd=tmp_path, env=environment(), preexec_fn=lambda: signal.signal(number, signal.SIG_DFL), **pipes
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert "Stopped: the same command goes on after the last finished epoch." in stdout
    assert "fail" not in stdout + stderr
    assert not (tmp_path / "run" / "genotype.json").exists()


CIFAR = ROOT.parent / "shared" / "cifar10" / "export.py"


@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 is not beside the repository")
@pytest.mark.parametrize(("space", "init"), [("hb", "heavy-ball"), ("agd", "zero")])
def test_real_cifar10_is_searched_and_a_network_retrained(space, init, tmp_path):
    needs("nni")
    export = [sys.executable, str(CIFAR), "npz", "c.npz", "--train", "160", "--test", "48"]
    subprocess.run(export, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    shared = ["--data", "c.npz", "--epochs", "1", "--cells", "3", "--batch-size", "16", "--accelerator", "cpu"]
    run("search", "--space", space, "--init", init, "--channels", "2", "--out", "run", *shared, folder=tmp_path)
    trained = run("retrain", "run/genotype.json", "--channels", "2", *shared, folder=tmp_path).stdout
    about = json.loads((tmp_path / "run" / "retrain" / "run.json").read_text())["data"]
    assert (about["images"], about["classes"], about["height"]) == (160, 10, 32)
    assert json.loads((tmp_path / "run" / "retrain" / "settings.json").read_text())["aux_weight"] == 0.4
    top1 = float(re.search(r"Test accuracy after the last epoch: ([\d.]+) %", trained)[1])
    assert abs(top1 * 48 / 100 - round(top1 * 48 / 100)) < 0.01  # of 48 images
    run("report", "run", folder=tmp_path)
    assert f"{about['sha256']}" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_cifar10_example_is_made_of_valid_commands_and_genotypes():
    from optinspired_plugins.cells.genotype import load_genotype

    folder = ROOT / "examples" / "cifar10"
    script = (folder / "run.sh").read_text(encoding="utf-8")
    for name in ("search", "retrain", "report"):
        (line,) = re.findall(f"optinspired {name} (.*)", script)
        documented = run(name, "--help", folder=ROOT).stdout
        assert all(option in documented for option in re.findall(r"--[\w-]+", line))
    for space, rule in (("hb", "hb"), ("agd", "agd"), ("darts", "agd")):
        assert load_genotype(folder / "genotypes" / f"{space}.json").rule == rule


def test_plots_are_written(tmp_path):
    for arguments in (
        ["algorithms"],
        ["convergence", "--steps", "30"],
        ["algorithm", "dmrnet", "--out", "new/d.svg"],
        ["pattern", "ogm"],
    ):
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
    assert "run/run.json: parameters=[/red]: must be an integer from 0 to 1e+15" in done.stderr
    done = run("report", "nothing", folder=tmp_path, ok=False)
    assert "source='nothing': must be the folder of a run, a genotype's file, or one of darts_v1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_users_algorithm_is_drawn_from_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "examples" / "my_algorithms.py").read_text(encoding="utf-8"))
    run("plot", "algorithm", "mine:OptimizedGradient", "--out", "mine.png", folder=tmp_path)
    run("plot", "pattern", "mine:LearnedHeavyBall", "--merge", "--nodes", "2", folder=tmp_path)
    assert (tmp_path / "pattern.png").stat().st_size > 5_000
    assert (tmp_path / "mine.png").stat().st_size > 5_000
    refused = run("plot", "algorithm", "mine:LearnedHeavyBall", folder=tmp_path, ok=False)
    assert "multiplies an iterate by a Parameter, not by a number" in refused.stderr


def test_a_users_algorithm_is_searched_from_the_current_folder(tmp_path):
    needs("nni", "sklearn")
    (tmp_path / "mine.py").write_text((ROOT / "examples" / "my_algorithms.py").read_text(encoding="utf-8"))
    small = shlex.split("--data digits --limit 64 --epochs 1 --batch-size 16 --channels 2 --cells 3 --padding 0")
    own = ["--algorithm", "mine:OptimizedGradient", "--init", "algorithm", "--edge-weights"]
    printed = run("search", "--out", "own", *own, *small, folder=tmp_path).stdout
    found = json.loads((tmp_path / "own" / "genotype.json").read_text(encoding="utf-8"))
    assert (found["version"], found["rule"]) == (2, "mine:OptimizedGradient")
    (retrain,) = re.findall(r"Train it: optinspired (retrain .*)", " ".join(printed.split()))
    short = shlex.split("--epochs 1 --batch-size 32 --cells 3 --channels 2 --cutout 0")
    run(*shlex.split(retrain)[:2], "--data", "digits", "--limit", "64", "--padding", "0", *short, folder=tmp_path)
    (tmp_path / "mine.py").unlink()  # a file of a genotype needs no algorithm
    run("report", "own", folder=tmp_path)
    run("plot", "cells", "own/genotype.json", folder=tmp_path)
    refused = run("search", "--out", "new", "--algorithm", "mine:Nothing", *small, folder=tmp_path, ok=False)
    assert "No module named 'mine'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_terminal_without_greek_letters_shows_help(tmp_path):
    needs("typer")
    env = environment(PYTHONIOENCODING="cp1252")
    done = subprocess.run(command("search", "--help"), cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "--alpha-lr" in done.stdout.decode("cp1252")
    assert "--install-completion" in run("--help", folder=tmp_path).stdout


def test_without_its_extra_the_command_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('no typer here')")
    done = run("--help", folder=tmp_path, ok=False, cold=True, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert "needs the extra 'viz'" in done.stderr
    assert "Traceback" not in done.stderr
