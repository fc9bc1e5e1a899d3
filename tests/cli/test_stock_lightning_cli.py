"""Lightning's own command line over our modules and data modules: importing them is all that it takes."""

import sys
import warnings

import pytest
import torch
from jsonargparse import _common
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_lm.datamodules import TextDataModule
from lightning_lm.models import ModelConfig
from lightning_lm.modules import GRPOModule, LMModule, PretrainModule
from lightning_lm.modules.token_losses import CrossEntropy
from lightning_lm.optim import SGD, AdamW, Muon

MODEL = ["--model.model=TransformerConfig", "--model.model.d_model=16", "--model.model.num_layers=1"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
QUIET += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=1"]


class Halved(LMModule):
    """A user's own module, with an argument of its own.

    Args:
        model: A config or a module.
        factor: Factor on the loss.
    """

    def __init__(self, model: ModelConfig, factor: float = 0.5, optimizer: AdamW = AdamW()) -> None:
        super().__init__(model, optimizer=optimizer)
        self.factor = factor

    def training_loss(self, batch):
        return CrossEntropy()(self.model, batch)

    def evaluate_batch(self, batch):
        raise NotImplementedError


class Random(LightningDataModule):
    """A user's own data.

    Args:
        vocab_size: Number of ids.
    """

    def __init__(self, vocab_size: int = 17) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def train_dataloader(self):
        ids = torch.arange(32).reshape(4, 8) % self.vocab_size
        return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)


@pytest.fixture
def cli(monkeypatch):
    def run(words, *classes, **settings):
        monkeypatch.setattr(sys, "argv", ["script.py", *QUIET, *words])
        return LightningCLI(*classes, run=False, save_config_callback=None, seed_everything_default=1, **settings)

    return run


def test_parts_are_named_by_class_in_a_users_own_script(cli):
    words = [*MODEL, "--model.optimizer=Muon", "--model.optimizer.adamw.lr=0.125", "--data.train=corpus.txt"]
    with pytest.warns(match="LightningCLI keeps the values"):
        built = cli(words, PretrainModule, TextDataModule)
    assert built.model.optimizer_part == Muon(lr=AdamW().lr, adamw=AdamW(lr=0.125))  # jsonargparse keeps the old lr
    assert built.model.model_config.d_model == 16


def test_values_that_lightning_cli_keeps_of_a_replaced_class_are_named_with_what_to_type(cli):
    words = [*MODEL, "--model.optimizer=SGD", "--model.schedule=WSD", "--model.schedule.final=0.5"]
    with pytest.warns(match="LightningCLI keeps the values") as said:
        cli(words, PretrainModule, TextDataModule)
    message = str(said[0].message)
    assert "model.optimizer.lr=0.0006 of AdamW" in message
    assert "final" not in message
    typed = message.partition("would be ")[2].partition(";")[0].split()
    assert typed == ["--model.optimizer.lr=0.1", "--model.optimizer.weight_decay=0.0", "--model.schedule.warmup=0.0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        built = cli([*words, *typed], PretrainModule, TextDataModule)
        assert built.model.optimizer_part == SGD()
        cli(MODEL, PretrainModule, TextDataModule)


def test_a_module_of_ours_trains_beside_a_users_data(cli):
    built = cli([*MODEL, "--model.model.vocab_size=17", "--model.optimizer=SGD"], PretrainModule, Random)
    built.trainer.fit(built.model, built.datamodule)
    assert isinstance(built.model.optimizer_part, SGD)
    assert built.trainer.global_step == 1


def test_classes_are_chosen_on_the_command_line(cli):
    words = ["--model=Halved", *MODEL, "--model.model.vocab_size=17", "--model.factor=0.25", "--data=Random"]
    built = cli(words, LMModule, subclass_mode_model=True, subclass_mode_data=True)
    assert isinstance(built.model, Halved)
    assert built.model.factor == 0.25
    assert isinstance(built.datamodule, Random)


def test_a_configuration_is_dumped_and_read_again(cli, tmp_path):
    words = [*MODEL, "--model.rewards=[FormatTags]", "--model.plan.samples_per_prompt=4"]
    first = cli(words, GRPOModule, Random)
    text = first.parser.dump(first.config)
    (tmp_path / "config.yaml").write_text(text)
    again = cli([f"--config={tmp_path / 'config.yaml'}"], GRPOModule, Random)
    assert again.parser.dump(again.config) == text
    assert again.model.plan.samples_per_prompt == 4


def test_importing_us_changes_no_setting_of_the_parser():
    assert not _common.subclasses_enabled_types
    assert set(_common.subclasses_disabled_selectors) >= {"is_pure_dataclass", "is_final_class"}
