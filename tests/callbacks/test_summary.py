"""The summary against numbers counted by hand."""

import io
from types import SimpleNamespace

import pytest
import rich
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console

from lightning_lm.callbacks import LMSummary
from lightning_lm.callbacks.batches import row_length, rows_per_device
from lightning_lm.data import PairRows, SupervisedRows
from lightning_lm.datamodules import ChatDataModule, PreferenceDataModule, PromptDataModule, UnpairedDataModule
from lightning_lm.models import TransformerConfig, memory_estimate
from lightning_lm.models.summary import ModelDescription, parameter_table, render


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


def test_rows_are_as_long_as_the_data_not_as_the_model_allows():
    """A published model sees 8,192 tokens: its pairs are cut at 256, and nobody knows how long a rollout will be."""
    module = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(context_length=8192)))
    records = [{"prompt": "a", "chosen": "b", "rejected": "c"}]

    def sizes(data, accumulate=1):
        trainer = SimpleNamespace(datamodule=data, accumulate_grad_batches=accumulate, world_size=1, strategy=None)
        return row_length(trainer, module), rows_per_device(trainer)

    pairs = PairRows(max_length=256)
    assert sizes(PreferenceDataModule(records, rows=pairs, batch_size=4)) == (256, 8)
    assert sizes(PreferenceDataModule(records, rows=pairs, batch_size=4), accumulate=2) == (256, 4)
    assert sizes(PreferenceDataModule(records, rows=PairRows(max_length=10_000), batch_size=4))[0] == 8192
    assert sizes(UnpairedDataModule(records, rows=pairs, batch_size=4)) == (256, 4)
    assert sizes(ChatDataModule(records, rows=SupervisedRows(context_length=64), batch_size=4)) == (64, 4)
    assert sizes(PromptDataModule(records, 0, batch_size=4))[0] is None
    assert sizes(None) == (8192, 1)


def test_a_summary_of_rollouts_says_that_activations_are_left_out():
    model = TransformerConfig(vocab_size=64, d_model=16, num_layers=1, context_length=8192).build()
    rows, memory = tuple(parameter_table(model)), memory_estimate(model, 0)
    unknown = ModelDescription(rows=rows, context_length=8192, flops_per_token=1e6, memory=memory)
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(render(unknown))
    text = " ".join(console.file.getvalue().split())  # the table is narrow, and its caption wrapped
    assert "per trained token at context 8192" in text
    assert "without activations: parameters" in text
