"""LightningModules: thin shells that wire a model, a loss, an optimizer and a schedule to a stock Trainer."""

from lightning_lm.modules.base import Compile, LMModule
from lightning_lm.modules.checkpoint import load_model, read_checkpoint
from lightning_lm.modules.dpo import DPOModule
from lightning_lm.modules.imitation import DFT, NLL, ImitationLoss
from lightning_lm.modules.losses import CrossEntropy, TokenLossPart
from lightning_lm.modules.metrics import MeasuredModule, RunningMetrics
from lightning_lm.modules.precomputed import NumberedPairs, PrecomputedReference
from lightning_lm.modules.pretrain import PretrainModule
from lightning_lm.modules.recompute import ActivationCheckpointing
from lightning_lm.modules.reference import (
    AdapterReference,
    CopyReference,
    FrozenCopy,
    Reference,
    ReferenceScores,
    SlowSync,
    adapters_off,
)
from lightning_lm.modules.reward import BradleyTerry, RewardModule
from lightning_lm.modules.reward_model import LearnedReward, ModelReward, RewardModel, load_reward_model
from lightning_lm.modules.sft import SFTModule
from lightning_lm.modules.window import GradientWindow

__all__ = [
    "DFT",
    "NLL",
    "ActivationCheckpointing",
    "AdapterReference",
    "BradleyTerry",
    "Compile",
    "CopyReference",
    "CrossEntropy",
    "DPOModule",
    "FrozenCopy",
    "GradientWindow",
    "ImitationLoss",
    "LMModule",
    "LearnedReward",
    "MeasuredModule",
    "ModelReward",
    "NumberedPairs",
    "PrecomputedReference",
    "PretrainModule",
    "Reference",
    "ReferenceScores",
    "RewardModel",
    "RewardModule",
    "RunningMetrics",
    "SFTModule",
    "SlowSync",
    "TokenLossPart",
    "adapters_off",
    "load_model",
    "load_reward_model",
    "read_checkpoint",
]
