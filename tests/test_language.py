"""Docstrings and documents are plain technical English: words that make sentences hard to read are rare."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RIDDLES = re.compile(r"\b(what|that of|those of|of which|whose|likewise|behind|again)\b", re.IGNORECASE)
PER_THOUSAND = 1.0
PACKAGES = ("optinspired_plugins", "timm_models", "nni_spaces", "examples", "benchmarks")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def docstrings(folder):
    """Return all docstrings of a package."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = []
    for file in sorted(folder.rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
        texts += filter(None, map(ast.get_docstring, nodes))
    return "\n\n".join(texts)


def prose(markdown):
    """Return a document without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE))


def rate(text):
    """Return how many of 1,000 words are on the list, and the sentences they stand in."""
    words = len(re.findall(r"\w+", text))
    lines = [line.strip() for line in text.splitlines() for _ in RIDDLES.findall(line)]
    return 1000 * len(lines) / max(words, 1), "\n".join(lines)


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_are_plain(package):
    count, lines = rate(prose(docstrings(ROOT / package)))
    assert count <= PER_THOUSAND, lines


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_are_plain(document):
    text = prose(document.read_text(encoding="utf-8"))
    count, lines = rate(text)
    assert count <= PER_THOUSAND or len(lines.splitlines()) <= 1, lines


def test_words_of_the_list_are_counted():
    assert rate("Return what is whose, again.\nNothing here, and `what` is code.")[0] > 100
    assert rate(prose("`what` is code\n```\nwhat\n```\n"))[0] == 0
