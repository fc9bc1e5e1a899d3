"""LightningDataModules: thin shells over ``lightning_lm.data``."""

from lightning_lm._lightning import register_strategies
from lightning_lm.datamodules.base import ResumableDataModule, StepAlignment
from lightning_lm.datamodules.chat import ChatDataModule
from lightning_lm.datamodules.classification import QualityDataModule
from lightning_lm.datamodules.loader import Loading
from lightning_lm.datamodules.objectives import (
    DenoisingDataModule,
    MaskedTextDataModule,
    PrefixTextDataModule,
    Seq2SeqDataModule,
)
from lightning_lm.datamodules.preference import PreferenceDataModule
from lightning_lm.datamodules.prompts import PromptDataModule
from lightning_lm.datamodules.text import TextDataModule
from lightning_lm.datamodules.unpaired import UnpairedDataModule
from lightning_lm.deprecation import renamed_exports

__all__ = [
    "ChatDataModule",
    "DenoisingDataModule",
    "Loading",
    "MaskedTextDataModule",
    "PreferenceDataModule",
    "PrefixTextDataModule",
    "PromptDataModule",
    "QualityDataModule",
    "ResumableDataModule",
    "Seq2SeqDataModule",
    "StepAlignment",
    "TextDataModule",
    "UnpairedDataModule",
]

__getattr__ = renamed_exports(__name__, {"PositionedDataModule": "ResumableDataModule"}, until="0.3")

register_strategies()
