"""From text to batches, once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_lm.data import Files, Mixture, Texts, TokenStore
from lightning_lm.datamodules import TextDataModule
from lightning_lm.datamodules import corpus as corpus_module
from lightning_lm.datamodules.loader import Loading
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals import compression
from lightning_lm.models import Attention, Layer, TransformerConfig, save_huggingface
from lightning_lm.modules import CheckpointModel, PretrainModule
from lightning_lm.tokenizers import Bytes, ByteTokenizer, TrainBPE

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def rows_of(loader):
    return [row for batch in loader for row in batch["input_ids"].tolist()]


def test_train_and_validation_share_no_document_and_lose_none(make_data, texts):
    data = ready(make_data(validation=0.2))
    held_out = list(data.validation_texts())
    assert 0 < len(held_out) < len(texts)
    expected = sum(len(text.encode()) + 1 for text in held_out)
    found = sum(int((batch["labels"] != -100).sum()) for batch in data.val_dataloader())
    assert found == expected
    train = data._train.num_targets
    assert train + found == sum(len(text.encode()) + 1 for text in texts)


def test_batches_are_what_modules_expect(make_data):
    batch = next(iter(ready(make_data()).train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "position_ids", "document_ids"}
    assert {value.shape for value in batch.values()} == {(8, 33)}
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_file_is_all_it_takes(tmp_path, make_data):
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(f"story {k} " * 9 for k in range(50)))
    data = ready(make_data(str(tmp_path / "stories.txt"), 0.1))
    assert len(data.train_dataloader()) > 0
    assert len(data.val_dataloader()) > 0


def test_validation_may_be_a_source_of_its_own_or_nothing(make_data, texts):
    data = ready(make_data(texts[:20], texts[20:]))
    assert list(data.validation_texts()) == texts[20:]
    none = ready(make_data(validation=0))
    assert none.val_dataloader() == []
    assert list(none.validation_texts()) == []


def test_the_second_run_trains_no_tokenizer_and_tokenizes_nothing(make_data, texts, tmp_path, monkeypatch):
    part = TrainBPE(vocab_size=300, num_workers=1)
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    how = {"tokenizer": part, "cache_dir": str(tmp_path / "cache")}
    first = ready(make_data(str(tmp_path / "a.txt"), 0.1, **how))

    def fail(*arguments):
        raise AssertionError("done again")

    monkeypatch.setattr(TrainBPE, "train", fail)
    monkeypatch.setattr(Files, "documents", fail)
    second = ready(make_data(str(tmp_path / "a.txt"), 0.1, **how))
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert rows_of(second.train_dataloader()) == rows_of(first.train_dataloader())


def test_the_tokenizer_sees_the_train_side_alone(make_data, monkeypatch):
    seen = []
    monkeypatch.setattr(TrainBPE, "train", lambda self, texts: seen.extend(texts) or ByteTokenizer())
    data = make_data(validation=0.3, tokenizer=TrainBPE(vocab_size=257))
    data.prepare_data()
    assert seen
    assert not set(seen) & set(data.validation_texts())


def test_a_tokenizer_that_exists_is_used_as_it_is(make_data):
    tokenizer = ByteTokenizer()
    data = make_data(tokenizer=tokenizer)
    assert data.tokenizer is tokenizer
    assert ready(data).tokenizer is tokenizer
    assert make_data(tokenizer=Bytes()).tokenizer is None


def test_a_mixture_keeps_its_weights_over_the_split(make_data):
    upper, lower = Texts(texts=["AB" * 40] * 30 + ["BA" * 40]), Texts(texts=["ab" * 20, "ba" * 20, "aa" * 20])
    data = ready(make_data(Mixture(sources=(upper, lower), weights=(3, 1)), 0.2))
    rows = [row for _ in range(3) for row in rows_of(data.train_dataloader())]
    is_upper = [any(ord("A") <= token <= ord("Z") for token in row) for row in rows]
    assert abs(sum(is_upper) / len(rows) - 0.75) < 0.02
    assert {text.isupper() for text in data.validation_texts()} == {True, False}


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpus_module.cache_folder(None) == tmp_path / "lightning-lm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert corpus_module.cache_folder(None) == Path.home() / ".cache" / "lightning-lm"
    assert corpus_module.cache_folder("here") == Path("here")


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([], 0, "empty"),
        ([""], 0, "empty"),
        ([], 0.1, "empty"),
        (["x"], 0.1, "validation=0"),
        (iter(["a", "b"]), 0, "read only once"),
        ("no/such/file.txt", 0, "no file or folder"),
    ],
)
def test_a_corpus_that_cannot_be_used_says_why(make_data, train, validation, message):
    data = make_data(train, validation)
    with pytest.raises(DataError, match=message):
        data.prepare_data()


def test_one_byte_is_a_corpus(make_data, noting):
    """One row of two targets, however long the context."""
    data = make_data(["x"], 0, batch_size=2, context_length=512)
    with pytest.warns(UserWarning, match=r"1 document\(s\), 2 tokens\) gives 1 row\(s\), fewer than one batch of 2"):
        Trainer(max_steps=3, enable_model_summary=False, **QUIET).fit(noting, data)
    batch = next(iter(data.train_dataloader()))
    assert (batch["labels"] != -100).sum() == 4
    assert data.samples_consumed == 6


def test_a_document_longer_than_the_context_is_split(make_data):
    data = ready(make_data(["a" * 1000], 0, context_length=32))
    assert data._train.num_targets == 1001


def test_numbers_out_of_range_are_refused_at_once():
    with pytest.raises(ConfigurationError, match="at least 1"):
        TextDataModule(batch_size=0)
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        TextDataModule(validation=1.5)


def test_a_batch_that_cannot_be_divided_is_refused_with_the_remedy(make_data, noting):
    trainer = Trainer(max_steps=1, accumulate_grad_batches=3, enable_model_summary=False, **QUIET)
    with pytest.raises(ConfigurationError, match="multiple of 3"):
        trainer.fit(noting, make_data(batch_size=8))


def test_a_schedule_of_accumulation_is_refused(make_data, noting):
    callbacks = [GradientAccumulationScheduler({1: 2})]
    trainer = Trainer(max_epochs=2, callbacks=callbacks, enable_model_summary=False, **QUIET)
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches changed from 1 to 2"):
        trainer.fit(noting, make_data())


def test_validation_in_a_trainer_counts_each_target_once(make_data, noting):
    data = make_data(validation=0.3)
    Trainer(enable_model_summary=False, **QUIET).validate(noting, data, verbose=False)
    assert noting.targets == sum(len(text.encode()) + 1 for text in data.validation_texts())


def test_only_a_trainer_that_goes_on_keeps_the_position(make_data, noting):
    data = make_data()
    Trainer(max_steps=5, enable_model_summary=False, **QUIET).fit(noting, data)
    assert data.samples_consumed == 40
    first = noting.seen[0][2]
    Trainer(max_steps=1, enable_model_summary=False, **QUIET).fit(noting, data)
    assert noting.seen[-1][2] == first
    assert data.samples_consumed == 8


def test_a_trainer_that_goes_on_with_another_corpus_moves_on_in_it(make_data, noting, texts):
    trainer = Trainer(max_steps=2, enable_model_summary=False, **QUIET)
    trainer.fit(noting, make_data(texts[:15]))
    trainer.fit_loop.epoch_loop.max_steps = 6
    another = make_data(texts[15:])
    trainer.fit(noting, another)
    assert another.samples_consumed == 4 * another.batch_size


def test_overfitting_sees_the_same_batches_each_epoch(make_data, noting):
    trainer = Trainer(max_epochs=3, overfit_batches=2, enable_model_summary=False, **QUIET)
    trainer.fit(noting, make_data())
    rows = [rows for _, _, rows, _ in noting.seen]
    assert rows[:2] == rows[2:4] == rows[4:]
    assert rows[0] != rows[1]


def test_stores_are_whole_and_lie_in_the_cache(make_data, tmp_path):
    ready(make_data(cache_dir=str(tmp_path)))
    (folder,) = (tmp_path / "tokens").iterdir()
    TokenStore(folder).verify()


def test_train_token_counts_are_those_of_the_training_side(make_data, texts):
    data = ready(make_data(validation=0.2))
    held_out = set(data.validation_texts())
    trained = [text.encode() for text in texts if text not in held_out]
    counts = data.train_token_counts()
    assert counts[:256].tolist() == [sum(text.count(byte) for text in trained) for byte in range(256)]
    assert counts[data.tokenizer.eos_id] == len(trained)


def test_token_counts_of_a_large_store_take_little_memory(make_data, monkeypatch):
    data = ready(make_data(["ab" * 5_000] * 30))
    sizes = []
    count = np.bincount
    monkeypatch.setattr(compression, "_CHUNK", 1000)
    monkeypatch.setattr(np, "bincount", lambda ids, **options: sizes.append(len(ids)) or count(ids, **options))
    assert data.train_token_counts().sum() == 30 * 10_001
    assert max(sizes) <= 1000


def test_how_much_text_there_is_and_how_often_it_is_seen_is_said(tmp_path, noting, caplog):
    loading = Loading(cache_dir=str(tmp_path), tokenize_workers=1)
    texts = ["abcdefg"] * 30
    data = TextDataModule(texts, ["abcd"], tokenizer=ByteTokenizer(), context_length=8, batch_size=3, loading=loading)
    trainer = Trainer(max_steps=30, limit_train_batches=1, max_epochs=1, enable_model_summary=False, **QUIET)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(noting, data)
    said = "Training text: 30 document(s), 240 tokens, 30 rows of 8 tokens\n30 steps of 3 rows are 3 epochs"
    assert f"{said}\nValidation text: 1 document(s), 5 tokens" in caplog.text


def test_the_tokenizer_of_the_checkpoint_is_taken_and_no_new_one_trained(make_data, tmp_path):
    own = ByteTokenizer(("<|endoftext|>", "<|own|>"))
    model = TransformerConfig(vocab_size=own.vocab_size, d_model=16, num_layers=1, context_length=64).build()
    save_huggingface(model, tmp_path / "folder", own)
    data = make_data(tokenizer=None)
    Trainer(max_steps=1, **QUIET).fit(PretrainModule(CheckpointModel(str(tmp_path / "folder"))), datamodule=data)
    assert data.tokenizer.fingerprint == own.fingerprint
    data = make_data(tokenizer=TrainBPE(vocab_size=300, num_workers=1))
    with pytest.raises(ConfigurationError, match=r"--data\.tokenizer null"):
        Trainer(max_steps=1, **QUIET).fit(PretrainModule(CheckpointModel(str(tmp_path / "folder"))), datamodule=data)


def test_a_model_with_fewer_ids_than_the_tokenizer_is_refused(make_data):
    model = TransformerConfig(vocab_size=50, d_model=8, num_layers=1, layers=Layer(mixer=Attention(num_heads=1)))
    module = PretrainModule(model.build())
    with pytest.raises(ConfigurationError, match=r"The model has 50 ids, but the tokenizer has 257"):
        Trainer(max_steps=1, enable_model_summary=False, **QUIET).fit(module, make_data())
