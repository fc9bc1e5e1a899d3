"""Tiny modules that know nothing of this package, and the data and trainers they are run with."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

VOCAB = 256


class ByteTokenizerStub:
    """Each id is one byte, save the last, which is a special token."""

    vocab_size = VOCAB
    eos_id = VOCAB - 1

    @property
    def special_tokens(self):
        return {"<|end|>": self.eos_id}

    def token_byte_lengths(self):
        lengths = np.ones(VOCAB, dtype=np.int64)
        lengths[-1] = 0
        return lengths

    def encode(self, text, *, allow_special=False):
        return list(text.encode("latin-1"))

    def decode(self, ids):
        return bytes(ids).decode("latin-1")


class ForeignModule(LightningModule):
    """A bigram model with dropout: ``forward`` gives logits, ``validation_step`` gives nothing."""

    def __init__(self, vocab_size=VOCAB, d_model=8):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, input_ids):
        return self.head(self.dropout(self.embedding(input_ids)))

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        return None

    def test_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_batches(sizes, *, seed=0, vocab_size=VOCAB, ignored=0.3):
    """Return batches of the given (rows, tokens) with some labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for shape in sizes:
        ids = torch.randint(vocab_size, shape, generator=generator)
        labels = ids.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)
        batches.append({"input_ids": ids, "labels": labels})
    return batches


@pytest.fixture
def loader_of():
    return lambda batches: DataLoader(batches, batch_size=None)


@pytest.fixture
def batches_of():
    return make_batches


@pytest.fixture
def foreign_module():
    return ForeignModule


@pytest.fixture
def tokenizer():
    return ByteTokenizerStub()


@pytest.fixture
def trainer_with(tmp_path: Path):
    def build(*callbacks, **options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=list(callbacks), **(defaults | options))

    return build


@pytest.fixture
def record_of():
    """A logger that keeps what it is given."""

    class Record(Logger):
        name = version = "record"

        def __init__(self):
            super().__init__()
            self.metrics = []
            self.texts = []

        @property
        def experiment(self):
            return self

        def add_text(self, name, text, global_step):
            self.texts.append((name, text, global_step))

        def log_metrics(self, metrics, step=None):
            self.metrics.append((step, dict(metrics)))

        def log_hyperparams(self, params, *args, **kwargs):
            pass

    return Record
