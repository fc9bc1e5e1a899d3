"""The command before any verb runs: help, version, unknown verbs, and how errors end the program."""

import importlib
import os
import signal
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


@pytest.mark.parametrize(
    ("verb", "words", "left"),
    [
        ("tokenizer", ["train", "--input", "x", "--output", "out"], "out is as it was."),
        ("export", ["--checkpoint", "x", "--output", "out"], "out is as it was."),
        ("import", ["x.gguf", "--output", "out"], "out is as it was."),
        ("sweep", ["--config", "x", "--ledger", "l.jsonl"], "Finished runs are in l.jsonl; the same command trains"),
        ("generate", ["--checkpoint", "x"], ""),
        ("fit", [], "No step was under way; checkpoints are as they were."),
        ("validate", [], ""),
        ("profile", [], ""),
    ],
)
def test_sigterm_ends_a_verb_with_a_line_that_says_what_is_left(monkeypatch, capfd, verb, words, left):
    module = importlib.import_module(cli._VERBS[verb].module)
    before = signal.getsignal(signal.SIGTERM)

    def work(*_):
        ready, begun = os.pipe()
        child = os.fork()
        if not child:
            os.write(begun, b"x")  # Python drops signals that arrive before a fork has ended
            while True:  # a worker ends at once
                os.getppid()
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "run", work)
    assert cli.main([verb, *words]) == 128 + signal.SIGTERM
    assert capfd.readouterr().err.strip().startswith(f"Stopped by SIGTERM. {left}".strip())
    assert signal.getsignal(signal.SIGTERM) is before
