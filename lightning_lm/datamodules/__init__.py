"""LightningDataModules: thin shells over ``lightning_lm.data``."""

from lightning_lm._lightning import register_strategies
from lightning_lm.datamodules.base import PositionedDataModule, StepAlignment
from lightning_lm.datamodules.chat import ChatDataModule
from lightning_lm.datamodules.loader import Loading
from lightning_lm.datamodules.preference import PreferenceDataModule
from lightning_lm.datamodules.prompts import PromptDataModule
from lightning_lm.datamodules.text import TextDataModule
from lightning_lm.datamodules.unpaired import UnpairedDataModule

__all__ = [
    "ChatDataModule",
    "Loading",
    "PositionedDataModule",
    "PreferenceDataModule",
    "PromptDataModule",
    "StepAlignment",
    "TextDataModule",
    "UnpairedDataModule",
]

register_strategies()
