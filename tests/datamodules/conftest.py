"""A corpus that is quickly made, and a module that notes all it is given."""

import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F

from lightning_lm.datamodules import Loading, TextDataModule
from lightning_lm.tokenizers import Bytes


class Noting(LightningModule):
    """Predicts bytes from single bytes; remembers step, batch, rows and loss of each micro-batch."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(257, 8)
        self.head = torch.nn.Linear(8, 257)
        self.seen = []
        self.targets = 0

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        rows = [hash(tuple(row)) for row in batch["input_ids"].tolist()]
        self.seen.append((self.trainer.global_step, batch_idx, rows, loss.item()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.targets += int((batch["labels"][:, 1:] != -100).sum())

    def _loss(self, batch):
        logits = self.head(self.embedding(batch["input_ids"][:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches  # asks for the training loader before a checkpoint is restored
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.fixture
def make_noting():
    """Return a function that makes the module, always with the same weights."""

    def make():
        torch.manual_seed(1)
        return Noting()

    return make


@pytest.fixture
def noting(make_noting):
    """Return a module."""
    return make_noting()


@pytest.fixture(scope="session")
def texts():
    """Return thirty documents of 1 to 200 characters."""
    draw = random.Random(0)
    return ["".join(draw.choices("abcdef \n", k=draw.randint(1, 200))) for _ in range(30)]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder that the tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_data(texts, cache):
    """Return a function that makes a small `TextDataModule`; it takes fields of `Loading` as well."""

    def make(train=texts, validation=0, *, batch_size=8, context_length=32, tokenizer=Bytes(), seed=0, **loading):
        loading = Loading(**{"cache_dir": str(cache), "show_progress": False, "tokenize_workers": 1, **loading})
        return TextDataModule(
            train,
            validation,
            tokenizer=tokenizer,
            context_length=context_length,
            batch_size=batch_size,
            seed=seed,
            loading=loading,
        )

    return make
