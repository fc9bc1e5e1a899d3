"""The report against the compressors themselves, and commands that name files that exist."""

import gzip
import io
import lzma
import math
import shlex
from collections import Counter

import numpy as np
import pytest
import rich
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from lightning_lm.callbacks import CompressionReport, Perplexity, RunReport
from lightning_lm.callbacks.run_report import Left, commands
from lightning_lm.cli import main
from lightning_lm.data import ChatML, Plain, SupervisedRows
from lightning_lm.datamodules import ChatDataModule, Loading
from lightning_lm.models import Attention, Layer, TransformerConfig, fit_ngram
from lightning_lm.modules import SFTModule
from lightning_lm.tokenizers import BPETokenizer

TEXTS = ["one sentence, and one more: é", "", "a second document " * 20]


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), width=80, color_system=None)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return console


@pytest.fixture
def data(loader_of, batches_of, tokenizer):
    class Data(LightningDataModule):
        def __init__(self):
            super().__init__()
            self.tokenizer = tokenizer

        def train_dataloader(self):
            return loader_of(batches_of([(2, 9)] * 4))

        val_dataloader = train_dataloader

        def validation_texts(self):
            return iter(TEXTS)

    tokenizer.encode_batch = lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
    return Data()


def test_values_are_those_of_the_compressors(foreign_module, data, trainer_with, record_of, console):
    record = record_of()
    trainer = trainer_with(Perplexity(), CompressionReport(), logger=record, max_epochs=1)
    trainer.fit(foreign_module(), data)
    raw = "".join(TEXTS).encode()
    values = {name.split("/")[1]: value for _, m in record.metrics for name, value in m.items() if "report" in name}
    assert values["gzip_bits_per_byte"] == pytest.approx(8 * len(gzip.compress(raw, 9)) / len(raw))
    assert values["xz_bits_per_byte"] == pytest.approx(8 * len(lzma.compress(raw, preset=9)) / len(raw))
    counts = Counter(raw)
    counts[255] = 3  # the ends of the documents
    shares = {byte: (count + 1) / (len(raw) + 3 + 256) for byte, count in counts.items()}
    bits = -sum(counts[byte] * math.log2(share) for byte, share in shares.items())
    assert values["unigram_bits_per_byte"] == pytest.approx(bits / len(raw))
    lines = console.file.getvalue().splitlines()
    names = [line[:21].strip() for line in lines if "━" in line]
    assert set(names) == {"this model", "gzip -9", "xz -9", "unigram over tokens"}
    shown = [float(line[21:].split()[0]) for line in lines if "━" in line]
    assert shown == sorted(shown)


def test_an_n_gram_model_of_the_training_text_stands_beside(
    foreign_module, data, trainer_with, record_of, console, monkeypatch
):
    train = np.frombuffer(b"one sentence, and one more" * 9 + b"\xff" + b"a second document " * 30, np.uint8)
    ends = np.array([26 * 9 + 1, len(train)])
    data.train_documents = lambda: iter([(train, ends)])
    record = record_of()
    trainer_with(Perplexity(), CompressionReport(ngram_order=3), logger=record, max_epochs=1).fit(
        foreign_module(), data
    )
    values = dict(pair for _, m in record.metrics for pair in m.items())
    model = fit_ngram([(train, ends)], order=3, vocab_size=256)
    logs = [model.log_probs(np.array([*text.encode(), 255])).sum() for text in TEXTS if text]
    expected = -sum(logs) / math.log(2) / len("".join(TEXTS).encode())
    assert values["report/ngram_bits_per_byte"] == pytest.approx(expected)
    shown = console.file.getvalue()
    assert "3-gram over tokens" in shown
    better = values["report/ngram_bits_per_byte"] < values["val/bits_per_byte"]
    assert better == ("The n-gram model has read all" in shown)
    for limit in (int(ends[0]), 50):  # of a long text the first documents, of a long document its beginning
        monkeypatch.setattr("lightning_lm.callbacks.compression_report._NGRAM_TOKENS", limit)
        record = record_of()
        trainer_with(CompressionReport(ngram_order=3), logger=record, max_epochs=1).fit(foreign_module(), data)
        values = dict(pair for _, m in record.metrics for pair in m.items())
        model = fit_ngram([(train[:limit], np.array([limit]))], order=3, vocab_size=256)
        logs = [model.log_probs(np.array([*text.encode(), 255])).sum() for text in TEXTS if text]
        expected = -sum(logs) / math.log(2) / len("".join(TEXTS).encode())
        assert values["report/ngram_bits_per_byte"] == pytest.approx(expected)


def test_only_the_beginning_of_a_long_text_is_compressed(foreign_module, data, trainer_with, record_of, console):
    record = record_of()
    trainer_with(CompressionReport(max_bytes=25), logger=record, max_epochs=1).fit(foreign_module(), data)
    raw = TEXTS[0].encode()[:25]
    values = dict(pair for _, m in record.metrics for pair in m.items())
    assert values["report/gzip_bits_per_byte"] == pytest.approx(8 * len(gzip.compress(raw, 9)) / len(raw))


@pytest.mark.parametrize("interval", [{"val_check_interval": 3}, {"val_check_interval": 50}, {"max_steps": 3}])
def test_the_final_weights_are_measured_whatever_the_interval(foreign_module, data, trainer_with, console, interval):
    """The line of the model is that of its last step, also if the run would not have validated then, or at all."""
    report = CompressionReport()
    defaults = {"max_epochs": 2, "check_val_every_n_epoch": None}
    module = foreign_module()
    trainer = trainer_with(Perplexity(), report, **(defaults | interval))
    trainer.fit(module, data)
    assert report._validated_step == trainer.global_step
    shown = next(line for line in console.file.getvalue().splitlines() if line.startswith("  this model  "))
    again = trainer_with(Perplexity())
    again.validate(module, data, verbose=False)
    assert float(shown.split()[2]) == pytest.approx(float(again.callback_metrics["val/bits_per_byte"]), abs=6e-4)


def test_a_run_without_validation_says_that_the_model_was_not_measured(foreign_module, data, trainer_with, console):
    trainer_with(Perplexity(), CompressionReport(), max_epochs=1, limit_val_batches=0).fit(foreign_module(), data)
    assert "gzip" in console.file.getvalue()
    assert "was not measured" in console.file.getvalue()


def test_the_final_validation_changes_no_weight(foreign_module, data, trainer_with, console):
    weights = []
    for callbacks in ([], [CompressionReport()]):
        module = foreign_module()
        torch.manual_seed(3)
        trainer_with(*callbacks, max_epochs=2, val_check_interval=3).fit(module, data)
        weights.append(module.head.weight.detach())
    assert torch.equal(*weights)


def test_results_of_a_run_whose_data_has_no_texts(foreign_module, loader_of, batches_of, trainer_with, console):
    trainer = trainer_with(Perplexity(), RunReport(), max_epochs=1, val_check_interval=1.0)
    trainer.fit(foreign_module(), loader_of(batches_of([(2, 9)] * 4)), loader_of(batches_of([(2, 9)])))
    text = console.file.getvalue()
    assert "Results at step 4" in text
    assert f"val/loss        {float(trainer.callback_metrics['val/loss']):.4f}" in text


def test_paths_and_commands_are_real(foreign_module, data, trainer_with, console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = TensorBoardLogger("runs dir", name="try")
    (tmp_path / logger.log_dir).mkdir(parents=True)
    (tmp_path / logger.log_dir / "config.yaml").write_text(yaml.dump({"seed": 1}))
    save = ModelCheckpoint(save_last=True)
    options = {"logger": logger, "enable_checkpointing": True, "max_steps": 4}
    trainer_with(CompressionReport(prompt="it's"), save, **options).fit(foreign_module(), data)
    text = console.file.getvalue()
    checkpoint = "runs dir/try/version_0/checkpoints/last.ckpt"
    assert (tmp_path / checkpoint).is_file()
    assert f"Checkpoint: {checkpoint}\nLogs: runs dir/try/version_0\n" in text
    assert "generate" not in text  # which knows nothing of a user's own module
    fit = f"  lightning-lm fit --config 'runs dir/try/version_0/config.yaml' --ckpt_path '{checkpoint}'"
    assert f"{fit} --trainer.max_steps 8\n" in text
    assert "  tensorboard --logdir 'runs dir/try'\n" in text


def test_a_checkpoint_in_parts_is_made_one_file_first(trainer_with, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.ckpt").mkdir()
    left = Left("last.ckpt", logs=None, config=None, tensorboard=None)
    one, two, *_ = commands(trainer_with(max_steps=1), left, "def")
    assert one == "lightning-lm consolidate last.ckpt --output last.whole.ckpt"
    assert two == "lightning-lm generate --checkpoint last.whole.ckpt --prompt def"


def test_a_run_that_left_nothing_says_so(foreign_module, loader_of, batches_of, trainer_with, console):
    trainer = trainer_with(CompressionReport(), max_epochs=1)
    trainer.fit(foreign_module(), loader_of(batches_of([(2, 9)] * 2)))
    assert console.file.getvalue() == "Checkpoint: none was written\nLogs: none were written\n"


def test_without_yaml_python_says_how_to_go_on(foreign_module, data, trainer_with, console, tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer_with(CompressionReport(), save, enable_checkpointing=True, max_epochs=3).fit(foreign_module(), data)
    assert "Trainer(max_epochs=6).fit(module, datamodule=datamodule, ckpt_path=" in console.file.getvalue()


def chat_data(template, records, cache):
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = BPETokenizer.train(["hello you"], 300, special_tokens=special, num_workers=1)
    rows, loading = SupervisedRows(context_length=64), Loading(cache_dir=str(cache), show_progress=False)
    return ChatDataModule(
        records, records[:1], tokenizer=tokenizer, template=template, rows=rows, batch_size=2, loading=loading
    )


@pytest.mark.parametrize(
    ("template", "options"), [(ChatML(), "--chat --prompt Hi"), (Plain(), "--prompt 'first line'")]
)
def test_a_run_on_chats_ends_with_a_conversation(template, options, trainer_with, console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = chat_data(template, [{"prompt": "first line\nsecond line\n", "completion": "you"}] * 2, tmp_path / "cache")
    config = TransformerConfig(d_model=16, num_layers=1, layers=Layer(mixer=Attention(num_heads=2)), context_length=64)
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer_with(RunReport(), save, enable_checkpointing=True, max_steps=1).fit(SFTModule(config), data)
    assert f"\n  lightning-lm generate --checkpoint last.ckpt {options}\n" in console.file.getvalue()
    words = ["generate", "--checkpoint", "last.ckpt", *shlex.split(options), "--max-new-tokens", "2"]
    assert main(words) == 0
