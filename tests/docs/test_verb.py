"""`lightning-lm docs` opens the local build, or prints how to build it, without torch."""

import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest

import lightning_lm
from lightning_lm.cli import main


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout without a built site."""
    (tmp_path / "mkdocs.yml").touch()
    monkeypatch.setattr(lightning_lm, "__file__", str(tmp_path / "lightning_lm" / "__init__.py"))
    return tmp_path


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Addresses that the browser was given."""
    found: list[str] = []
    monkeypatch.setattr(webbrowser, "open", found.append)
    return found


def test_a_page_that_is_built_is_opened(checkout, opened, capsys):
    (checkout / "build" / "site" / "tutorials").mkdir(parents=True)
    (checkout / "build" / "site" / "index.html").touch()
    (checkout / "build" / "site" / "tutorials" / "pretrain.html").touch()
    assert main(["docs"]) == 0
    assert main(["docs", "tutorials/pretrain.md"]) == 0
    assert main(["docs", "--no-browser"]) == 0
    assert [address.rpartition("/site/")[2] for address in opened] == ["index.html", "tutorials/pretrain.html"]
    assert main(["docs", "nothing"]) == 1
    assert "tutorials/pretrain" in capsys.readouterr().out


def test_without_a_build_it_says_how_to_make_one(checkout, opened, capsys):
    assert main(["docs"]) == 1
    said = capsys.readouterr().out
    assert str(checkout) in said
    assert "mkdocs build --strict" in said
    assert opened == []


def test_an_installation_without_sources_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lightning_lm, "__file__", str(tmp_path / "lightning_lm" / "__init__.py"))
    assert main(["docs"]) == 1
    assert "checkout" in capsys.readouterr().out


def test_it_loads_no_torch():
    code = "import sys; from lightning_lm.cli import main; main(WORDS); print('torch' in sys.modules)"
    code = code.replace("WORDS", "['docs', '--no-browser']")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.endswith("False\n")
