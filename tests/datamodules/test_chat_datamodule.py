"""ChatDataModule in a Trainer: rows in the same order however a run is cut, and what it says of its data."""

import dataclasses
import json

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_lm.data import ChatML, OnePerRow, ReverseDigits, SupervisedRows
from lightning_lm.datamodules import ChatDataModule, Loading
from lightning_lm.errors import ConfigurationError, DataError, FingerprintError
from lightning_lm.models import TransformerConfig, save_huggingface
from lightning_lm.modules import CheckpointModel, SFTModule
from lightning_lm.tokenizers import Bytes, ByteTokenizer, TrainCharacters

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

RECORDS = [{"prompt": "q" * (number % 7), "completion": f"{number}" * (1 + number % 5)} for number in range(60)]


def make_chat(cache, train=RECORDS, validation=0.0, **settings):
    loading = Loading(cache_dir=str(cache), show_progress=False, **settings.pop("loading", {}))
    settings = {"tokenizer": Bytes(), "rows": SupervisedRows(context_length=24), "batch_size": 4} | settings
    return ChatDataModule(train, validation, loading=loading, **settings)


def trainer_of(**limits):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, max_epochs=-1, num_sanity_val_steps=0, **quiet, **limits)


def rows_by_step(module):
    steps = {}
    for step, _, rows, _ in module.seen:
        steps.setdefault(step, []).extend(rows)
    return steps


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_was_stopped_sees_the_same_rows(make_noting, tmp_path, cache, accumulate, workers):
    whole = make_noting()
    trainer_of(max_steps=12).fit(whole, datamodule=make_chat(cache))
    first, second = make_noting(), make_noting()
    half = trainer_of(max_steps=7)
    half.fit(first, datamodule=make_chat(cache))
    half.save_checkpoint(tmp_path / "half.ckpt")
    data = make_chat(cache, loading={"num_workers": workers})
    rest = trainer_of(max_steps=12, accumulate_grad_batches=accumulate)
    rest.fit(second, datamodule=data, ckpt_path=tmp_path / "half.ckpt")
    assert rows_by_step(first) | rows_by_step(second) == rows_by_step(whole)
    assert data.samples_consumed == 12 * 4


@pytest.mark.parametrize(
    "change",
    [
        {"train": RECORDS[:-1]},
        {"rows": SupervisedRows(context_length=24, train_on="all")},
        {"rows": SupervisedRows(context_length=24, packing=OnePerRow())},
        {"seed": 1},
    ],
)
def test_other_rows_are_refused(make_noting, tmp_path, cache, change):
    trainer = trainer_of(max_steps=2)
    trainer.fit(make_noting(), datamodule=make_chat(cache))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(FingerprintError, match="not those of the checkpoint"):
        trainer_of(max_steps=4).fit(
            make_noting(), datamodule=make_chat(cache, **change), ckpt_path=tmp_path / "two.ckpt"
        )
    data = make_chat(cache, loading={"accept_changed_data": True}, **change)
    trainer_of(max_steps=4).fit(make_noting(), datamodule=data, ckpt_path=tmp_path / "two.ckpt")


def test_every_example_is_learned_once_an_epoch(cache):
    data = make_chat(cache, batch_size=1)
    data.prepare_data()
    data.setup("fit")
    learned = [batch["labels"][batch["labels"] != -100] for batch in data.train_dataloader()]
    text = ByteTokenizer().decode(torch.cat(learned).tolist())
    assert sorted(text.split("<|endoftext|>")[:-1]) == sorted(record["completion"] for record in RECORDS)
    (width,) = {batch["input_ids"].shape[1] for batch in data.train_dataloader()}
    assert width == data.context_length + 1 == 25


def test_validation_is_held_out_or_given(cache):
    data = make_chat(cache, validation=0.3)
    data.prepare_data()
    data.setup("fit")
    held_out = {text for text in data.validation_texts() if text.isdigit()}
    rows = [batch["labels"] for batch in data.val_dataloader()]
    decoded = ByteTokenizer().decode(torch.cat([row[row != -100] for row in rows]).tolist()).split("<|endoftext|>")[:-1]
    assert set(decoded) == held_out
    given = make_chat(cache, validation=RECORDS[:2])
    given.prepare_data()
    given.setup("fit")
    assert len(list(given.validation_texts())) == 4
    assert make_chat(cache).val_dataloader() == []
    with pytest.raises(DataError, match="two different records"):
        make_chat(cache, train=RECORDS[:1], validation=0.01).prepare_data()


def chats(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": turns, "id": number}) for number in range(8)))
    return file


def test_the_tokenizer_of_the_checkpoint_is_taken(tmp_path, cache):
    tokenizer = ByteTokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    model = TransformerConfig(vocab_size=259, d_model=16, num_layers=1, context_length=64).build()
    save_huggingface(model, tmp_path / "folder", tokenizer)
    data = make_chat(
        cache, train=chats(tmp_path), tokenizer=None, template=ChatML(), rows=SupervisedRows(context_length=48)
    )
    module = SFTModule(CheckpointModel(checkpoint=str(tmp_path / "folder")))
    trainer = trainer_of(max_steps=2)
    trainer.fit(module, datamodule=data)
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    again = make_chat(
        cache, train=chats(tmp_path), tokenizer=None, template=ChatML(), rows=SupervisedRows(context_length=48)
    )
    trainer_of(max_steps=1).fit(SFTModule(CheckpointModel(checkpoint=str(tmp_path / "tuned.ckpt"))), datamodule=again)
    assert again.tokenizer.fingerprint == tokenizer.fingerprint


def test_without_a_tokenizer_anywhere_it_says_so(cache):
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        make_chat(cache, tokenizer=None).prepare_data()


def test_what_is_lost_is_said(cache):
    data = make_chat(cache, rows=SupervisedRows(context_length=6, too_long="drop"))
    with pytest.warns(UserWarning, match=r"Of 60 examples \d+ were dropped"):
        data.prepare_data()


def test_the_demonstration_task(cache):
    source = ReverseDigits(num_examples=50)
    data = make_chat(
        cache, train=source, validation=dataclasses.replace(source, held_out=True), tokenizer=TrainCharacters()
    )
    data.prepare_data()
    data.setup("fit")
    assert data.tokenizer.vocab_size == 13  # ten digits, the equals sign, unknown, end of text
    record = next(iter(source.records()))
    wanted = [12, *data.tokenizer.encode(record["prompt"] + record["completion"]), 12]
    rows = [batch["input_ids"] for batch in data.train_dataloader()]
    assert any(wanted == row[:13].tolist() for row in torch.cat(rows))


def test_numbers_out_of_range(cache):
    with pytest.raises(ConfigurationError, match="batch_size"):
        make_chat(cache, batch_size=0)
    with pytest.raises(ConfigurationError, match="context_length=0"):
        SupervisedRows(context_length=0)
