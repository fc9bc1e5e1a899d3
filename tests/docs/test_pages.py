"""The pages name files, objects, figures and messages that exist, and every page stands in the navigation."""

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


class Loader(yaml.SafeLoader):
    """Reads `mkdocs.yml`."""


@pytest.mark.parametrize("page", TEXT)
def test_files_that_a_page_names_exist(page):
    for path in PATH.findall(TEXT[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXT)
def test_sources_and_figures_that_a_page_shows_exist(page):
    for kind, first, second in MACRO.findall(TEXT[page]):
        assert source.fenced(first, second) if kind == "source" else figures.figure(first)
    assert TEXT[page].count("{{ ") == len(MACRO.findall(TEXT[page]))


def test_every_page_stands_in_the_navigation():
    def listed(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(listed, entry.values() if isinstance(entry, dict) else entry))

    nav = listed(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    assert {page for page in nav if not page.startswith("reference/")} == {
        page for page in TEXT if not page.startswith("reference/")
    }
