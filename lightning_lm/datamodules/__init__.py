"""LightningDataModules: thin shells over ``lightning_lm.data``."""

from lightning_lm.datamodules.loader import Loading
from lightning_lm.datamodules.resume import StepAlignment
from lightning_lm.datamodules.text import TextDataModule

__all__ = ["Loading", "StepAlignment", "TextDataModule"]
