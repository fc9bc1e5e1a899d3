"""LightningModules: thin shells that wire a model, a loss, an optimizer and a schedule to a stock Trainer."""

from lightning_lm._lightning import register_strategies
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.base import Compile, LMModule
from lightning_lm.modules.checkpoint import CheckpointModel, load_model, read_checkpoint
from lightning_lm.modules.classification import ClassificationModule, fit_temperature
from lightning_lm.modules.dpo import DPOModule
from lightning_lm.modules.gradient_normalization import GradientWindow
from lightning_lm.modules.grpo import GRPOModule
from lightning_lm.modules.kto import KTOModule
from lightning_lm.modules.masked_lm import MaskedLMModule, MaskedNLL
from lightning_lm.modules.metrics import MeasuredModule, RunningMetrics
from lightning_lm.modules.pipeline import GPipe, OneForwardOneBackward, PipelineModule, PipelineSchedule
from lightning_lm.modules.ppo import PPOModule
from lightning_lm.modules.preference.compared import ComparedModule
from lightning_lm.modules.preference.precomputed_reference import NumberedPairs, PrecomputedReference
from lightning_lm.modules.preference.reference import (
    AdapterReference,
    CopyReference,
    FrozenCopy,
    Reference,
    ReferenceScores,
    SlowSync,
    adapters_off,
)
from lightning_lm.modules.pretrain import PretrainModule
from lightning_lm.modules.reward import BradleyTerry, RewardModule
from lightning_lm.modules.reward_model import (
    LearnedReward,
    ModelReward,
    RewardCheckpoint,
    RewardModel,
    load_reward_model,
)
from lightning_lm.modules.rl.critic import Critic, KLReward, ValueModel
from lightning_lm.modules.rl.experience_loader import ExperienceLoader, PromptSource
from lightning_lm.modules.rl.objective import Objective, ObjectiveTerms
from lightning_lm.modules.rl.policy import PolicyModule
from lightning_lm.modules.rl.rollout import Rollout, RolloutEngine, RolloutPlan, Validation
from lightning_lm.modules.seq2seq import Seq2SeqModule
from lightning_lm.modules.sft import SFTModule
from lightning_lm.modules.signal_stop import SignalStop
from lightning_lm.modules.token_losses import (
    DFT,
    NLL,
    CrossEntropy,
    ImitationLoss,
    MultiToken,
    TokenLossPart,
    token_scores,
)

__all__ = [
    "DFT",
    "NLL",
    "ActivationCheckpointing",
    "AdapterReference",
    "BradleyTerry",
    "CheckpointModel",
    "ClassificationModule",
    "ComparedModule",
    "Compile",
    "CopyReference",
    "Critic",
    "CrossEntropy",
    "DPOModule",
    "ExperienceLoader",
    "FrozenCopy",
    "GPipe",
    "GRPOModule",
    "GradientWindow",
    "ImitationLoss",
    "KLReward",
    "KTOModule",
    "LMModule",
    "LearnedReward",
    "MaskedLMModule",
    "MaskedNLL",
    "MeasuredModule",
    "ModelReward",
    "MultiToken",
    "NumberedPairs",
    "Objective",
    "ObjectiveTerms",
    "OneForwardOneBackward",
    "PPOModule",
    "PipelineModule",
    "PipelineSchedule",
    "PolicyModule",
    "PrecomputedReference",
    "PretrainModule",
    "PromptSource",
    "Reference",
    "ReferenceScores",
    "RewardCheckpoint",
    "RewardModel",
    "RewardModule",
    "Rollout",
    "RolloutEngine",
    "RolloutPlan",
    "RunningMetrics",
    "SFTModule",
    "Seq2SeqModule",
    "SignalStop",
    "SlowSync",
    "TokenLossPart",
    "Validation",
    "ValueModel",
    "adapters_off",
    "fit_temperature",
    "load_model",
    "load_reward_model",
    "read_checkpoint",
    "token_scores",
]

register_strategies()
