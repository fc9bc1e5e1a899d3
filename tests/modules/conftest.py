"""Small models, ragged rows and loaders for the tests of training modules."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer

from lightning_lm.data import ReverseDigits
from lightning_lm.datamodules import PromptDataModule
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.tokenizers import CharacterTokenizer
from lightning_lm.types import IGNORE_INDEX

VOCAB = 31
WIDTH = 9


def ragged_rows(count: int, *, seed: int = 0, empty: bool = False) -> dict[str, torch.Tensor]:
    """Rows of which 1 to 8 positions are targets; rows 4 to 7 may hold none at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (count, WIDTH), generator=generator)
    labels = ids.clone()
    kept = torch.randint(1, WIDTH, (count,), generator=generator)
    if empty:
        kept[4:8] = 0
    labels[torch.arange(WIDTH) > kept[:, None]] = IGNORE_INDEX
    labels[:, 0] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


class Rows:
    """A sized loader over rows in order, from any batch on; each rank takes its share of every batch."""

    def __init__(self, rows: dict[str, torch.Tensor], size: int, *, rank: int = 0, ranks: int = 1, start: int = 0):
        self.rows, self.size, self.rank, self.ranks, self.start = rows, size, rank, ranks, start

    def __len__(self) -> int:
        return -(-len(self.rows["labels"]) // (self.size * self.ranks)) - self.start

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        whole = self.size * self.ranks
        for first in range(self.start * whole, len(self.rows["labels"]), whole):
            yield {name: value[first : first + whole][self.rank :: self.ranks] for name, value in self.rows.items()}


class RowData(LightningDataModule):
    """Rows for training that go on where the optimizer stopped, and some for validation."""

    def __init__(self, train: int = 96, *, size: int = 4, validation: int = 10):
        super().__init__()
        self.train_rows, self.validation_rows, self.size = ragged_rows(train), ragged_rows(validation, seed=1), size

    def train_dataloader(self) -> Rows:
        trainer = self.trainer
        done = trainer.global_step * trainer.accumulate_grad_batches
        return Rows(self.train_rows, self.size, rank=trainer.global_rank, ranks=trainer.world_size, start=done)

    def val_dataloader(self) -> Rows:
        return Rows(self.validation_rows, 3, rank=self.trainer.global_rank, ranks=self.trainer.world_size)


@pytest.fixture
def config() -> TransformerConfig:
    """Two layers of width 16."""
    return TransformerConfig(
        vocab_size=VOCAB, d_model=16, num_layers=2, layers=Layer(mixer=Attention(num_heads=2)), context_length=WIDTH - 1
    )


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., Trainer]:
    """A quiet Trainer on the CPU."""

    def make(**settings: Any) -> Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**quiet, **settings})

    return make


@pytest.fixture
def rows() -> Callable[..., dict[str, torch.Tensor]]:
    return ragged_rows


@pytest.fixture
def loader() -> type[Rows]:
    return Rows


@pytest.fixture
def row_data() -> type[RowData]:
    return RowData


@pytest.fixture
def digits() -> CharacterTokenizer:
    """Digits, the equals sign, and an end of text."""
    return CharacterTokenizer("0123456789=")


@pytest.fixture
def prompt_data(digits) -> Callable[..., PromptDataModule]:
    """Numbers to reverse: by default 12 of three digits, 4 a rollout, 6 held out."""

    def make(count: int = 12, **settings: Any) -> PromptDataModule:
        train = ReverseDigits(num_examples=count, num_digits=3)
        held_out = ReverseDigits(num_examples=6, num_digits=3, held_out=True)
        return PromptDataModule(train, held_out, **{"tokenizer": digits, "batch_size": 4, **settings})

    return make


@pytest.fixture
def policy(config, digits) -> Callable[[], torch.nn.Module]:
    """A small untrained policy, each time the same."""

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return dataclasses.replace(config, vocab_size=digits.vocab_size, context_length=16).build()

    return make
