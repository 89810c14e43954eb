"""The field's own words: what only we would understand is refused in package, notebooks, README, CONTRIBUTING and the help."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from vlsafe import cli

ROOT = Path(__file__).parents[2]
# what a reader would have to ask about -> what is said instead
WORDS = {
    r"\bcellars?\b": "run store",
    r"\bdeeds?\b": "verb–object pair",
    r"these[ _]models?\b": "item level",
    r"this[ _]recipe\b": "seed level",
    r"\bstammer\w*": "degenerate output",
    r"\bwholesale\b": "indiscriminate over-refusal",
    r"\b(same|own) eyes\b": "with the adapted vision tower and projector",
    r"\bforetold\b|\bforetells?\b": "predicted from an early checkpoint",
    r"\bpull(s|ing)? against each other\b": "conflicting gradients",
    r"\binside the line\b": "interior merge, 0 < α < 1",
    r"\bdata as they come\b": "unfiltered data",
    r"\banew\b": "again",
}
NAMES = {"told", "asked", "given", "made"}  # of variables, arguments, attributes and functions
TEXTS = ["README.md", "CONTRIBUTING.md", "Makefile", "Snakefile", "env/gated.md"]
TEXTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def sources():
    yield from sorted(path for path in (ROOT / "vlsafe").rglob("*") if path.suffix in (".py", ".md", ".html", ".jinja"))
    yield from sorted((ROOT / "env" / "scales").glob("*.yaml"))
    yield from (ROOT / name for name in TEXTS)


def refused(text):
    return [
        f"{found[0]!r}: say {word!r}" for pattern, word in WORDS.items() for found in [re.search(pattern, text, re.I)] if found
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_speak_the_fields_language(path):
    assert not refused(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_and_what_they_print(path):
    assert not refused(path.read_text(encoding="utf-8"))


def names(tree):
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


def test_no_variable_is_called_by_what_was_done_to_it():
    for path in sorted((ROOT / "vlsafe").rglob("*.py")):
        assert not NAMES & set(names(ast.parse(path.read_text(encoding="utf-8")))), path
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert not NAMES & set(names(ast.parse(code))), path


def test_the_help_of_every_command():
    def parsers(parser):
        yield parser
        for action in parser._actions:
            for below in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
                yield from parsers(below)

    every = list(parsers(cli._parser()))
    assert len(every) > 20
    for parser in every:
        assert not refused(parser.format_help()), parser.prog


def test_a_private_word_would_be_refused():
    assert refused("the Cellar of these models") and refused("foretells") and not refused("a run store at the item level")
    assert NAMES & set(names(ast.parse("def f(told): return told.asked")))
