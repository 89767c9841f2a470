"""Every snippet of the README runs, and every command of the site's pages with them.

Python code of README runs here, code of the site's pages in ``test_site.py``. Shell commands run on digits.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from extras import needs

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT.parent / "shared" / "timm"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").rglob("*.md"))]


def snippets(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def shell_lines():
    """Every command of shell in the README and the pages, once, on one line."""
    blocks = [block.replace("\\\n", " ") for text in (README, *PAGES) for block in snippets("bash", text)]
    return list(dict.fromkeys(" ".join(line.split()) for block in blocks for line in block.splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("code", snippets("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_snippets_run(code, tmp_path):
    env = {**os.environ, "HOME": str(tmp_path)}  # where NNI's own experiment keeps its list
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS.exists(), reason="timm's scripts are not beside the repository")
def test_shell_snippets_run(digits_folder, tmp_path):
    (tmp_path / "digits").symlink_to(digits_folder)
    commands = [line for line in shell_lines() if re.match(r"python \w+\.py ", line)]
    assert len(commands) == 4
    machine = ["-j", "0", "--device", "cuda" if torch.cuda.is_available() else "cpu"]
    for command in commands:
        _, script, *arguments = shlex.split(command)
        run = [SCRIPTS / script, *arguments, *machine]
        # The README names the folder of my_algorithms.
        path = os.pathsep.join(filter(None, [str(ROOT / "examples"), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path}
        result = warm.run(run, cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_the_search_snippets_run(tmp_path):
    needs("nni")
    commands = [line for line in shell_lines() if re.match(r"optinspired (search|retrain|report)", line)]
    assert [shlex.split(command)[1] for command in commands] == ["search", "retrain", "report"]
    for command in commands:
        fewer = [] if "report" in command else ["--limit", "200"]  # images, of 1,442
        done = warm.run(["-m", "optinspired_plugins.cli", *shlex.split(command)[1:], *fewer], cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("epoch ") == int(*re.findall(r"--epochs (\d+)", command))
    for name in ("genotype.json", "retrain/model.safetensors", "report.html"):
        assert (tmp_path / "runs" / "hb" / name).exists()
    guide = (ROOT / "docs" / "guide" / "search.md").read_text(encoding="utf-8")
    (call,) = re.findall(r"`(timm\.create_model\([^`]*model\.safetensors\"\))`", guide)
    assert warm.run(["-c", f"import timm; {call}"], cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_the_mmengine_snippets_run(digits_folder, tmp_path):
    needs("mmengine.runner")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(digits_folder)
    commands = [line for line in shell_lines() if "examples/mm/train.py" in line]
    assert len(commands) == 2
    for command in commands:
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in shlex.split(command)]
        python = words.index("python")
        env = {**os.environ, **dict(word.split("=") for word in words[:python])}
        done = warm.run(words[python + 1 :], cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed epoch: 10" in done.stdout + done.stderr
    assert (tmp_path / "runs" / "mm" / "epoch_12.pth").exists()


def test_the_readme_is_short():
    assert len(README.encode()) <= 6000


def test_relative_links_point_at_files():
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], target


def test_the_two_set_up_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_named_models_exist():
    import timm

    guide = (ROOT / "docs" / "guide" / "models.md").read_text(encoding="utf-8")
    models = guide.split("\n## Names\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`(?:hb|agd|opt|cell)net.*?) \|", models, flags=re.MULTILINE)
    assert len(rows) == 9
    for row in rows:
        first, *rest = re.findall(r"`(\w+)`", row)
        family = re.match(r"(hbnet|agdnet|optnet|cellnet)", first).group()
        for name in [first, *(n if n.startswith(family) else family + n for n in rest)]:
            assert timm.is_model(name), name
