"""The pages name files, objects, figures and messages that exist, and every page stands in the navigation."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXT = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
PATH = re.compile(
    r"`((?:lightning_lm|callbacks|strategies|recipes|tests|docs|functional|modules)/[\w./-]+|\w+\.(?:yml|toml))`"
)
MACRO = re.compile(r"^\{\{ (source|figure) (\S+)(?: (\S+))? \}\}$", re.MULTILINE)
sys.path.insert(0, str(DOCS / "hooks"))

import figures  # noqa: E402
import source  # noqa: E402

CODE = {
    path: path.read_text(encoding="utf-8")
    for name in ("lightning_lm", "callbacks", "strategies")
    for path in (ROOT / name).rglob("*.py")
}


@pytest.mark.parametrize("page", TEXT)
def test_files_that_a_page_names_exist(page):
    for path in PATH.findall(TEXT[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXT)
def test_sources_and_figures_that_a_page_shows_exist(page):
    for kind, first, second in MACRO.findall(TEXT[page]):
        assert source.fenced(first, second) if kind == "source" else figures.figure(first)
    begun = re.findall(r"^ *\{\{ ", TEXT[page], re.MULTILINE)  # inside a line they belong to a template of Jinja
    assert len(begun) == len(MACRO.findall(TEXT[page]))


def test_every_page_stands_in_the_navigation():
    def listed(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(listed, entry.values() if isinstance(entry, dict) else entry))

    nav = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert {page for page in nav if not page.startswith("reference/")} == {
        page for page in TEXT if not page.startswith("reference/")
    }


def templates() -> list[str]:
    """Return every string of the package, with `…` for the values in it."""
    found = []
    for text in CODE.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_that_the_documentation_explains_are_real():
    page = TEXT["help/troubleshooting.md"]
    messages = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    known = templates()
    unknown = []
    for message in messages:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(r".*?".join(parts), re.DOTALL)
        if not any(pattern.search(template) for template in known):
            unknown.append(message)
    assert unknown == []
    assert len(messages) == page.count("\n### ") >= 25
