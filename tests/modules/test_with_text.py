"""`PretrainModule` on `TextDataModule`: lengths that do not fit, and prediction."""

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_lm.datamodules import TextDataModule
from lightning_lm.errors import ConfigurationError
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.tokenizers import Bytes

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
TEXTS = ["one two three four " * 4, "five six seven eight " * 3]


def small(context_length: int) -> PretrainModule:
    return PretrainModule(TransformerConfig(d_model=16, num_layers=1, context_length=context_length))


def text(context_length: int) -> TextDataModule:
    return TextDataModule(TEXTS, TEXTS, tokenizer=Bytes(), context_length=context_length, batch_size=2)


def test_rows_longer_than_the_model_was_described_for_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"context_length=32, but .* context_length=16.*--data.context_length 16"
    ):
        Trainer(max_steps=1, **QUIET).fit(small(16), datamodule=text(32))
    Trainer(max_steps=1, **QUIET).fit(small(32), datamodule=text(16))


def test_prediction_gives_the_sums_of_each_batch() -> None:
    module, trainer = small(16), Trainer(max_steps=1, **QUIET)
    predictions = trainer.predict(module, datamodule=text(16))
    assert sum(int(sums["num_tokens"]) for sums in predictions) == sum(len(t.encode()) + 1 for t in TEXTS)
    (metrics,) = trainer.validate(module, datamodule=text(16), verbose=False)
    nll = torch.stack([sums["nll_sum"].double() for sums in predictions]).sum()
    assert nll.item() / sum(len(t.encode()) + 1 for t in TEXTS) == pytest.approx(metrics["val/loss"], rel=1e-6)
