"""The pages of the site: each is reached, its links lead somewhere, its code runs, its commands and names exist."""

import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import warm
from extras import needs
from test_readme import shell_lines

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BUILT = (DOCS / "_build", DOCS / "examples", DOCS / "results")
PAGES = {
    file.relative_to(DOCS).with_suffix("").as_posix(): file.read_text(encoding="utf-8")
    for file in sorted(DOCS.rglob("*.md"))
    if not any(file.is_relative_to(folder) for folder in BUILT)
}
# What a page needs beside timm.
NEEDS = {
    "guide/optuna": ("nni", "sklearn", "optuna"),
    "guide/search": ("nni", "sklearn"),
    "guide/segmentation": ("segmentation_models_pytorch",),
    "guide/spaces": ("nni", "sklearn"),
    "guide/strategies": ("nni", "sklearn"),
}
PACKAGES = ("optinspired_plugins", "timm_models", "nni_spaces")


@pytest.fixture(scope="module")
def equations():
    """docs/equations.py, which the site is built with."""
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("equations")
    sys.path.remove(str(DOCS))


def without_code(text):
    return re.sub(r"^```(?!\{).*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def slugs(text):
    """The anchors of a page, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def children(page):
    """The pages in the toctrees of a page."""
    trees = re.findall(r"```\{toctree\}\n(.*?)```", PAGES[page], flags=re.DOTALL)
    lines = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    names = [re.sub(r".*<(.*)>", r"\1", line) for line in lines]
    return [os.path.normpath(Path(page).parent / name) for name in names]


def test_every_page_is_reached_once():
    reached = [child for page in PAGES for child in children(page)]
    assert sorted(reached) == sorted({*PAGES, "examples/index"} - {"index"})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", without_code(PAGES[page])):
        path, _, anchor = target.partition("#")
        file = (DOCS / page).parent / path if path else DOCS / f"{page}.md"
        if path == "examples/index.rst":  # sphinx-gallery writes it
            continue
        assert file.exists(), target
        if anchor:
            assert anchor in slugs(file.read_text(encoding="utf-8")), target


def test_a_missing_anchor_is_found():
    assert slugs("# One table\n## timm's script\n```\n# no heading\n```\n") == {"one-table", "timms-script"}


def code(text):
    """The Python of a page as one program; blocks in lists are indented."""
    blocks = re.findall(r"^(?:: |  )?```python\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(
        re.sub(r"^  (?=\S)", "", block, flags=re.M) if block.startswith("  ") else block for block in blocks
    )


WITH_CODE = [page for page, text in PAGES.items() if "```python" in text]


def test_all_blocks_of_a_page_are_in_its_program():
    assert sum(text.count("```python") for text in PAGES.values()) > 30
    program = code("```python\na = 1\n```\ntext\n: ```python\n  b = a\n  ```\n")
    assert program == "a = 1\n\nb = a\n"


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page, tmp_path):
    needs(*NEEDS.get(page, ()))
    env = {**os.environ, "HOME": str(tmp_path)}
    done = warm.run(["-c", code(PAGES[page])], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_notebooks_have_the_code_of_their_pages(monkeypatch):
    needs("nbclient", "nbformat")
    monkeypatch.syspath_prepend(str(DOCS))
    from notebooks import DOORS, make_notebook, run

    for page in DOORS.values():
        notebook = make_notebook(PAGES[page])
        program = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        assert program.split() == code(PAGES[page]).split()
        text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        assert "](" not in re.sub(r"\]\(http", "", text)
        assert "{py:" not in text
    notebook = make_notebook("# Page\n```python\nimport sys\nprint(1 + 1, file=sys.stderr)\nprint(2 + 2)\n```\n")
    run(notebook)
    (output,) = notebook.cells[1].outputs
    assert (notebook.cells[0].source, output.text) == ("# Page", "4\n")


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in PAGES.values():
        for target in re.findall(r"(?:`|^)make ([\w-]+)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_extras_exist():
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [
        name for text in PAGES.values() for group in re.findall(r"\.\[([\w,]+)\]", text) for name in group.split(",")
    ]
    assert set(named) <= set(extras)
    assert len(named) > 4


def test_every_command_is_of_a_kind_that_is_tried():
    kinds = (
        r"pip install (\.|\"\.\[viz\]\")",
        r"make \w+",
        r"python (train|validate)\.py .*",  # the next three: test_readme.py
        r"optinspired (search|retrain|report) .*",
        r"(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 )?python examples/mm/train\.py .*",
        r"python examples/\d\d_\w+\.py --out \S+",  # test_examples.py
        r"python examples/digits\.py \S+",
        r"optinspired (plot algorithm .*|--help)",
    )
    for line in shell_lines():
        assert any(re.fullmatch(kind, line) for kind in kinds), line
        for file in re.findall(r"examples/\S+\.py", line):
            assert (ROOT / file).exists(), line


@pytest.mark.slow
def test_other_commands_run(tmp_path):
    needs("typer", "matplotlib", "sklearn")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])}
    commands = [line for line in shell_lines() if re.match(r"optinspired (plot|--help)|python examples/digits", line)]
    assert len(commands) == 3
    for command in commands:
        program, *words = shlex.split(command)
        start = ["-m", "optinspired_plugins.cli"] if program == "optinspired" else [ROOT / words.pop(0)]
        done = warm.run([*start, *words], cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "algorithm.png").exists()


@pytest.mark.slow
def test_the_page_about_the_command_has_every_command():
    needs("typer", "nni")
    from optinspired_plugins.cli import app, plot

    page = PAGES["api/command"]
    commands = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    figures = [command.name or command.callback.__name__.replace("_", "-") for command in plot.registered_commands]
    assert set(re.findall(r"`optinspired (\w+)", page)) == {*commands, "plot"}
    rows = re.findall(r"^\| `optinspired plot (.*?) \|", page, flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"[\w-]+", row)} == {*figures}


# --- the API and the table of equations -------------------------------------------------------------------------------

API = "\n".join(text for page, text in PAGES.items() if page.startswith("api/"))
DESCRIBED = re.findall(r"^\.\. (?:auto\w+|py:\w+):: (\S+)$", API, flags=re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_api_describes_all_public_names(package):
    module = importlib.import_module(package)
    public = [f"{package}.{name}" for name in module.__all__ if name != "__version__"]
    assert [name for name in public if DESCRIBED.count(name) != 1] == []


def test_what_the_api_describes_is_public_in_its_module():
    for name in DESCRIBED:
        assert not any(part.startswith("_") for part in name.split(".")), name


def test_the_table_of_equations_leads_to_the_api(equations):
    from optinspired_plugins.propagation.rules import EQUATIONS

    for equation in EQUATIONS:
        for name in filter(None, equation[1:5]):
            found = equations.public_name(name)
            assert found in DESCRIBED or found.rpartition(".")[0] in DESCRIBED, name
    lines = equations.table()
    assert len(lines) == len(EQUATIONS) + 2
    assert "<timm_models.HeavyBallStage>" in next(line for line in lines if line.startswith("| (16) |"))
    assert lines[2].endswith("| `test_algorithms.py`: gradient descent is the feedforward network 7 |")


# --- figures and numbers ----------------------------------------------------------------------------------------------


def test_the_table_of_parameters_is_the_counted_one():
    from architecture_table import BEGIN, END, table

    assert PAGES["parameters"].split(BEGIN)[1].split(END)[0].strip() == table(), (
        "run examples/reproduce/architecture_table.py --write docs/parameters.md"
    )


# A row of the guide -> the row of the speed page that it repeats.
REPEATED = {
    "`hbnet50`": "`hbnet50` / `resnet50`",
    'with `memory="reversible"`': "`hbnet50`, reversible / `resnet50`",
    "`hbnet152`, reversible, against `resnet152`": "`hbnet152`, reversible / `resnet152`",
    "*timm's `--grad-checkpointing`*": "`resnet50`, checkpointing / `resnet50`",
    "`agdnet121`": "`agdnet121` / `densenet121`",
    "*timm's `memory_efficient=True`*": "`densenet121`, memory_efficient / `densenet121`",
    "`optinspired search --space hb`": "hb space / NNI's DARTS",
}
CHECKPOINTED = (
    "`hbnet50`, checkpointing / `resnet50`",
    "`agdnet121`, checkpointing / `densenet121`",
    "hb space, checkpointing / NNI's DARTS",
)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_memory_modes_repeats_the_speed_page():
    page = PAGES["guide/memory"].split("## One table")[1].split("\n## ")[0]
    rows = [cells(line) for line in page.splitlines() if re.match(r"\| .* \| \d", line)]
    measured = {}
    for line in PAGES["speed"].splitlines():
        if line.startswith("| ") and line.count("|") == 6:
            measured.setdefault(cells(line)[0], cells(line))  # the first tables of the page
    checkpointed = iter(CHECKPOINTED)
    for name, time, memory, _ in rows:
        source = next(checkpointed) if name == "with `--grad-checkpointing`" else REPEATED[name]
        assert (time, memory) == (measured[source][1], measured[source][3]), name
    assert len(rows) == len(REPEATED) + len(CHECKPOINTED)


@pytest.mark.slow
def test_the_figure_of_an_iterate_is_drawn(equations, tmp_path):
    needs("matplotlib")
    from iterates_figure import LIVES, ROWS, draw

    stored, recovered = LIVES.values()
    during_later_stages = [
        {life.row for life in lives if life.begin <= 3 and life.end >= 4} for lives in (stored, recovered)
    ]
    assert during_later_stages == [set(ROWS) - {"x₀"}, {"x₂", "x₃"}]
    draw().savefig(tmp_path / "iterates.png")
    assert (tmp_path / "iterates.png").stat().st_size > 9999
