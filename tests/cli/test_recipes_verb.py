"""``lightning-lm recipes``: list, show, copy."""

import sys

import pytest

from lightning_lm.cli import main
from lightning_lm.cli.recipes import find_recipe, recipe_names


def test_list_names_every_recipe_with_its_title_and_no_base(root, capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = [file for file in (root / "recipes").rglob("*.yaml") if file.parent.name != "base"]
    assert [line.split()[0] for line in lines] == sorted(
        file.relative_to(root / "recipes").with_suffix("").as_posix() for file in files
    )
    assert all(len(line.split()) > 3 for line in lines), "a recipe starts with a comment that says what it is"


@pytest.mark.parametrize(
    "name", ["pretrain/quickstart", "pretrain/quickstart.yaml", "recipes/pretrain/quickstart.yaml"]
)
def test_a_recipe_is_found_by_each_of_its_names(name, root):
    found = find_recipe(name)
    assert found is not None
    assert found.read_bytes() == (root / "recipes" / "pretrain" / "quickstart.yaml").read_bytes()


@pytest.mark.parametrize("name", ["", "nothing", "../pyproject", "/etc/passwd", "pretrain"])
def test_what_is_no_recipe_is_not_found(name):
    assert find_recipe(name) is None


def test_show_prints_the_file(root, capsys):
    assert main(["recipes", "show", "pretrain/quickstart"]) == 0
    assert capsys.readouterr().out == (root / "recipes" / "pretrain" / "quickstart.yaml").read_text()


def test_copy_writes_a_file_and_never_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "pretrain/quickstart"]) == 0
    assert main(["recipes", "copy", "pretrain/quickstart", "mine/own.yaml"]) == 0
    assert (tmp_path / "mine" / "own.yaml").read_bytes() == (tmp_path / "quickstart.yaml").read_bytes()
    assert main(["recipes", "copy", "pretrain/quickstart", "."]) == 1
    assert "exists already" in capsys.readouterr().err


def test_an_unknown_recipe_lists_those_that_there_are(capsys):
    assert main(["recipes", "show", "nothing"]) == 1
    assert recipe_names()[0] in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 120])
def test_lists_and_the_first_page_fit_a_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for words in (["recipes"], ["--help"]):
        assert main(words) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    assert "pretrain/quickstart            Four minutes" in printed
