"""The command before any verb runs: help, version, unknown verbs, and how errors end the program."""

import subprocess
import sys

import pytest

from lightning_lm import __version__, cli
from lightning_lm.cli import main
from lightning_lm.errors import DataError, UsageError


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "predict", "profile", "generate", "tokenizer", "recipes"):
        assert f"  {verb} " in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-lm {__version__}\n"


def test_help_imports_neither_torch_nor_lightning(tmp_path):
    code = "import sys, lightning_lm.cli as cli; cli.main(['-h']); assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_an_unknown_verb_names_the_nearest(capsys):
    assert main(["fitt"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Unknown verb 'fitt'. Did you mean 'fit'?")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (DataError("The corpus is empty."), 1, "The corpus is empty."),
        (UsageError("Unknown key 'a'."), 2, "Unknown key 'a'."),
        (KeyboardInterrupt(), 130, "Stopped"),
        (OSError(28, "No space left on device", "/runs/x"), 1, "No space left on device (/runs/x). Free some space"),
        (PermissionError(13, "Permission denied", "/runs"), 1, "Permission denied (/runs). Change the permissions"),
    ],
)
def test_errors_end_in_one_block_and_a_status(monkeypatch, capsys, error, status, text):
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["fit"]) == status
    printed = capsys.readouterr().err
    assert text in printed
    assert "Traceback" not in printed


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail(words: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])
