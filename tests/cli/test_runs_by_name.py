"""Runs by name: the newest that has finished, folders that only one run at a time writes into, and their records."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lm.cli import demo, main
from lightning_lm.errors import CheckpointError, ConfigurationError, TokenizerError
from lightning_lm.modules import CheckpointModel
from lightning_lm.storage import DEMOS, claim_version, held, record_run, resolve_checkpoint
from lightning_lm.tokenizers import load_tokenizer

RECIPE = """
base: base/trainer
trainer: {max_steps: 2, val_check_interval: 2, accelerator: cpu, logger: {init_args: {name: tiny}},
  callbacks: [LastCheckpoint], enable_progress_bar: false, enable_model_summary: false}
model: {model: {class_path: TransformerConfig,
  init_args: {d_model: 16, num_layers: 1, layers: {mixer: {num_heads: 2}}}}}
data: {train: corpus, validation: corpus, tokenizer: Bytes, context_length: 16, batch_size: 2}
"""


def run_of(folder, version, status=None, time=0.0):
    checkpoint = folder / version / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    if status is not None:
        record_run(folder / version, status, time=time, checkpoint="checkpoints/last.ckpt")
    return checkpoint


def test_the_newest_finished_run_is_taken_whatever_its_number(tmp_path, capfd):
    runs = tmp_path / "runs" / "sft_reverse"
    run_of(runs, "version_0", "finished", 1.0)
    wanted = run_of(runs, "version_9", "finished", 3.0)
    run_of(runs, "version_10", "finished", 2.0)
    for number, status in enumerate(("running", "stopped", "failed"), 11):
        run_of(runs, f"version_{number}", status, 4.0)
    (runs / "version_14").mkdir()
    assert resolve_checkpoint(runs) == wanted
    assert resolve_checkpoint(str(runs / "version_0")) == runs / "version_0/checkpoints/last.ckpt"
    assert resolve_checkpoint(wanted) == wanted
    printed = capfd.readouterr().err
    assert printed.startswith(f"{runs}: {wanted}, of the run that finished last (")


def test_a_run_of_a_script_or_an_earlier_release_has_no_record_and_counts(tmp_path):
    assert resolve_checkpoint(tmp_path) == tmp_path  # some other folder, such as a model's
    wanted = run_of(tmp_path, "version_0")
    run_of(tmp_path, "version_1", "failed")
    assert resolve_checkpoint(tmp_path) == wanted


def test_a_name_without_a_finished_run_gets_the_command_that_makes_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "Run sft/reverse first: lightning-lm fit --config sft/reverse"
    with pytest.raises(CheckpointError, match=command):
        resolve_checkpoint("runs/sft_reverse")
    left = run_of(Path("runs/sft_reverse"), "version_0", "stopped")
    with pytest.raises(CheckpointError, match=rf"has finished; .* name its file: {left}. {command}"):
        resolve_checkpoint("runs/sft_reverse")


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("smollm2", "lightning-lm demo smollm2 --output smollm2"),
        ("../models/smollm2", "lightning-lm demo smollm2 --output ../models/smollm2"),
        ("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B, then name Qwen3-0.6B"),
        ("runs/sft_chat/version_3/checkpoints/last.ckpt", "lightning-lm fit --config sft/chat"),
        ("runs/mine", "Train that one first, or check the path"),
        ("/abs/mine", "Train that one first, or check the path"),
    ],
)
def test_whatever_is_missing_says_where_it_comes_from(tmp_path, monkeypatch, path, command):
    monkeypatch.chdir(tmp_path)
    assert set(demo.PACKAGES) == DEMOS
    for read in (resolve_checkpoint, load_tokenizer, lambda path: CheckpointModel(path).build()):
        with pytest.raises((CheckpointError, TokenizerError), match=re.escape(command)):
            read(path)


def test_a_folder_is_held_until_its_holder_is_killed(tmp_path):
    hold = f"from lightning_lm.storage import held\nwith held(__import__('pathlib').Path({str(tmp_path)!r}), 'x'):\n"
    hold += "    print('held', flush=True)\n    __import__('threading').Event().wait()"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(ConfigurationError, match=rf"in use by process {process.pid} on .*, or wait\."),
            held(tmp_path, "wait"),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with held(tmp_path, "wait"):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writes, b"!")
            signal.pause()
        os.read(reads, 1)
    try:
        with held(tmp_path, "wait"):  # a forked process does not hold it
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == []


def test_each_new_run_claims_a_number(tmp_path):
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_x").mkdir()
    assert [claim_version(tmp_path) for _ in range(2)] == [8, 9]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "0.txt").write_text("abc def " * 60)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "tiny"


def test_a_run_records_how_it_ended_and_measuring_uses_no_number(tiny, capsys):
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    record = json.loads((tiny / "version_0" / "run.json").read_text())
    assert (record["status"], record["step"], record["checkpoint"]) == ("finished", 2, "checkpoints/last.ckpt")
    assert main(["validate", "--config", "tiny.yaml", "--ckpt_path", "runs/tiny"]) == 0
    assert main(["fit", "--config", "tiny.yaml", "--data.train", "nothing"]) == 1
    assert main(["fit", "--config", "tiny.yaml", "--model.model.d_model", "15"]) != 0
    assert resolve_checkpoint("runs/tiny") == Path("runs/tiny/version_0/checkpoints/last.ckpt")
    assert sorted(path.name for path in tiny.iterdir()) == ["validate", "version_0", "version_1"]
    assert json.loads((tiny / "version_1" / "run.json").read_text())["status"] == "failed"
    assert main(["fit", "--config", "runs/tiny/version_0/config.yaml"]) == 0  # a run of its own
    assert json.loads((tiny / "version_2" / "run.json").read_text())["status"] == "finished"
    with held(tiny / "version_2", "wait"):
        assert main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last"]) == 1
    assert "is in use by process" in capsys.readouterr().err


VERBS = {
    "tokenizer": ["tokenizer", "train", "--input", "corpus", "--output", "held", "--vocab-size", "300"],
    "export": ["export", "--checkpoint", "last.ckpt", "--output", "held"],
    "sweep": ["sweep", "--config", "scaling/isoflop_quickstart", "--ledger", "held.jsonl"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_second_of_two_at_once_says_who_is_there(tiny, capsys, verb):
    with held(Path("held_runs" if verb == "sweep" else "held"), "wait"):
        assert main(VERBS[verb]) == 1
    printed = capsys.readouterr().err
    assert f"is in use by process {os.getpid()} on" in printed
    assert "or choose another --output." in printed or "or use another --ledger." in printed
    assert not list(Path().glob("held*"))
