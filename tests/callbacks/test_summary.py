"""The summary against numbers counted by hand."""

import io

import pytest
import rich
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console

from lightning_lm.callbacks import LMSummary


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return console


def test_roles_flops_and_memory_of_a_foreign_module(
    foreign_module, loader_of, batches_of, trainer_with, console, monkeypatch
):
    seen = []
    monkeypatch.setattr("lightning_lm.callbacks.summary.render", lambda description: seen.append(description) or "")

    class Data(LightningDataModule):
        context_length = 8
        batch_size = 12

        def train_dataloader(self):
            return loader_of(batches_of([(2, 9)] * 2))

    class Module(foreign_module):
        def configure_optimizers(self):
            return [torch.optim.AdamW(self.parameters())]

    trainer_with(LMSummary(), max_epochs=1, accumulate_grad_batches=2).fit(Module(), Data())
    (description,) = seen
    counts = {row.role: (row.tensors, row.parameters) for row in description.rows}
    assert counts == {"embedding": (1, 256 * 8), "head": (1, 256 * 8), "vector": (1, 256)}
    assert description.context_length == 8
    assert description.flops_per_token == 6 * 8 * 256
    memory, weights = description.memory, 4 * (2 * 256 * 8 + 256)
    assert (memory.parameters, memory.gradients, memory.optimizer_states) == (weights, weights, 2 * weights)


def test_it_is_printed_once_and_takes_the_place_of_lightnings(
    foreign_module, loader_of, batches_of, trainer_with, console
):
    summary = LMSummary()
    trainer = trainer_with(summary, max_epochs=1, enable_model_summary=True)
    assert [c for c in trainer.callbacks if isinstance(c, ModelSummary)] == [summary]
    trainer.fit(foreign_module(), loader_of(batches_of([(2, 9)] * 3)))
    text = console.file.getvalue()
    assert text.count("embedding") == 1
    assert "2.05 k" in text  # 256 * 8
