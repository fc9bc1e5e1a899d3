"""JSON without end: every reader of foreign JSON refuses nesting and numbers that Python's own reader fails on."""

import json
import re
from pathlib import Path

import pytest

import lightning_lm
from lightning_lm.cli.generate import _read_messages
from lightning_lm.data import TokenFiles, TokenStore
from lightning_lm.data.post_training.messages import messages_of
from lightning_lm.errors import LightningLMError
from lightning_lm.kernels.runtime.launch_settings import read_table
from lightning_lm.models import load_huggingface
from lightning_lm.models.huggingface.peft_adapters import adapter_base
from lightning_lm.models.huggingface.weights import weight_files
from lightning_lm.rewards.code import source_of_tests
from lightning_lm.scaling import RunLedger
from lightning_lm.scaling.import_runs import import_runs
from lightning_lm.storage import record_run, resolve_checkpoint
from lightning_lm.storage.json_text import parse_json
from lightning_lm.strategies.checkpoints.digests import check_folder
from lightning_lm.tokenizers import load_tokenizer

HOSTILE = {
    "deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": '{"format": %s, "model": 1}' % ("7" * 6_000),
    "cut": "[" * 100_000,
}
READERS = {
    "config of a model": ("config.json", lambda path: load_huggingface(path.parent)),
    "index of weights": ("model.safetensors.index.json", lambda path: weight_files(path.parent)),
    "adapters": ("adapter_config.json", lambda path: adapter_base(path.parent)),
    "store": ("meta.json", lambda path: TokenStore(path.parent)),
    "litdata": ("index.json", lambda path: next(iter(TokenFiles(path=str(path.parent)).token_documents(0)))),
    "kernel settings": ("table.json", read_table),
    "digests of a sharded folder": ("digests.json", lambda path: check_folder(path.parent)),
    "tokenizer.json": ("tokenizer.json", lambda path: load_tokenizer(path.parent)),
    "tokenizer of ours": ("lightning_lm_tokenizer.json", lambda path: load_tokenizer(path.parent)),
    "table of runs": ("runs.json", import_runs),
    "lines of runs": ("runs.jsonl", import_runs),
    "messages of the command line": ("messages.json", _read_messages),
    "messages": ("text", lambda path: messages_of(path.read_text(), "messages")),
}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_it(tmp_path, reader, text):
    name, read = READERS[reader]
    (tmp_path / name).write_text(HOSTILE[text])
    with pytest.raises(LightningLMError) as caught:
        read(tmp_path / name)
    assert len(str(caught.value)) < 1_500


@pytest.mark.parametrize("text", HOSTILE)
def test_what_may_be_damaged_is_passed_over(tmp_path, text):
    """Lines of a ledger, records of runs, and tests that only look like JSON."""
    RunLedger(tmp_path / "ledger.jsonl").path.write_text(HOSTILE[text] + "\n")
    assert RunLedger(tmp_path / "ledger.jsonl").read() == []
    record_run(tmp_path / "runs" / "version_0", "finished", checkpoint="last.ckpt")
    (tmp_path / "runs" / "version_0" / "run.json").write_text(HOSTILE[text])
    with pytest.raises(LightningLMError):
        resolve_checkpoint(tmp_path / "runs")
    assert source_of_tests(HOSTILE["cut"]) == HOSTILE["cut"]


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "ü"]}, [], "text", -7, 10**4_000])
def test_other_values_are_what_json_reads(value):
    assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value).encode())


OWN = {"lora.py", "transformers_model.py", "generation_config.py", "sweep.py", "export.py", "folders.py"}
"""Files that parse what they, or a library in this process, have just written."""
APART = {
    "answer_worker.py",
    "answer_workers.py",
    "gym.py",
    "reasoning_gym.py",
    "replay.py",
    "sandbox.py",
    "sandbox_child.py",
    "word_count_process.py",
}
"""Both ends of a pipe between processes of this package."""
BOUNDED = {"records.py", "json_text.py"}
"""Files that catch all three errors themselves."""


def test_no_reader_calls_json_itself():
    root = Path(lightning_lm.__file__).parents[1]
    sources = [path for part in ("lightning_lm", "callbacks", "strategies") for path in (root / part).rglob("*.py")]
    found = {path.name for path in sources if re.search(r"\bjson\.loads?\(", path.read_text(encoding="utf-8"))}
    assert found - OWN - APART - BOUNDED == set()
