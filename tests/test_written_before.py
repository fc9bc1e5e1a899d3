"""Files that version 0.1 wrote before its modules moved: they open, and training resumes from them.

`tests/fixtures/version_0_1` was made on 2026-11-30 from the commit "The current folder is searched last for modules":
two steps of pretrain/quickstart on `corpus.txt`, one process and fsdp2, and three of grpo/reverse, with tiny models.
`chat`, two steps of SFTModule on `chats.jsonl`, was made before the arguments `learn_on`, `exchange` and `answers` were
renamed, which its configuration and that of grpo_reverse name.
"""

import importlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lightning_lm.cli import main
from lightning_lm.data import TokenStore
from lightning_lm.modules import load_model
from lightning_lm.scaling import RunLedger
from lightning_lm.tokenizers import load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "version_0_1"
CHANGED_NS = 1796063011807201761
"""When `chats.jsonl` was written: a run knows the files that it trains on by their names, sizes and times."""
RUNS = ("quickstart", "sharded", "grpo_reverse", "chat")


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy of the fixtures, which is the working directory."""
    shutil.copytree(FIXTURES, tmp_path / "before")
    os.utime(tmp_path / "before" / "chats.jsonl", ns=(CHANGED_NS, CHANGED_NS))
    monkeypatch.chdir(tmp_path / "before")
    return Path()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_resumed_by_its_own_config(name, before):
    run = before / "runs" / name / "version_0"
    steps = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] + 1
    checkpoint = run / "checkpoints" / "last.ckpt"
    arguments = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    assert main(["fit", *arguments, "--trainer.max_steps", str(steps), "--trainer.strategy", "auto"]) == 0
    resumed = before / "runs" / name / "version_1"
    written = torch.load(resumed / "checkpoints" / "last.ckpt", weights_only=True)
    assert written["global_step"] == steps


@pytest.mark.parametrize("name", ["quickstart", "grpo_reverse"])
def test_a_config_names_classes_by_what_exports_them(name, before, capsys):
    config = before / "runs" / name / "version_0" / "config.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(config), "--print_config"])
    assert ended.value.code == 0
    paths = re.findall(r"class_path: (lightning_lm\.\S+)", capsys.readouterr().out)
    assert len(paths) > 10
    for path in paths:
        package, _, cls = path.rpartition(".")
        assert package.count(".") == 1
        assert isinstance(getattr(importlib.import_module(package), cls), type)


@pytest.mark.parametrize("name", ["quickstart", "grpo_reverse"])
def test_a_model_is_loaded_with_its_tokenizer(name, before):
    model, tokenizer = load_model(before / "runs" / name / "version_0" / "checkpoints" / "last.ckpt")
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode("12=")])
    with torch.no_grad():
        assert torch.isfinite(model(ids)).all()


def test_token_stores_tokenizers_and_ledgers_are_read(before):
    (folder,) = (before / "cache" / "tokenizers").glob("tokenizer-4b*")
    tokenizer = load_tokenizer(folder)
    stores = [TokenStore(path) for path in sorted((before / "cache" / "tokens").iterdir())]
    text = (before / "corpus.txt").read_text()
    for store in stores:
        store.verify()
        documents = [tokenizer.decode([int(i) for i in store[index]]) for index in range(len(store))]
        assert all(document.replace("<|endoftext|>", "").strip() in text for document in documents)
    ledger, line = RunLedger(before / "ledger.jsonl"), json.loads((before / "ledger.jsonl").read_text())
    (record,) = ledger.read()
    assert ledger.bad_lines() == []
    assert (record.loss, record.tokens) == (line["run"]["loss"], line["run"]["tokens"])
