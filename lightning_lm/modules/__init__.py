"""LightningModules: thin shells that wire a model, a loss, an optimizer and a schedule to a stock Trainer."""

from lightning_lm.modules.base import Compile, LMModule
from lightning_lm.modules.checkpoint import load_model, read_checkpoint
from lightning_lm.modules.losses import CrossEntropy, TokenLossPart
from lightning_lm.modules.metrics import MeasuredModule, RunningMetrics
from lightning_lm.modules.pretrain import PretrainModule
from lightning_lm.modules.recompute import ActivationCheckpointing
from lightning_lm.modules.window import GradientWindow

__all__ = [
    "ActivationCheckpointing",
    "Compile",
    "CrossEntropy",
    "GradientWindow",
    "LMModule",
    "MeasuredModule",
    "PretrainModule",
    "RunningMetrics",
    "TokenLossPart",
    "load_model",
    "read_checkpoint",
]
