"""Rewards that can be verified, shared by reinforcement learning and evaluation."""

from lightning_lm.rewards.answers import (
    AfterHashes,
    AnswerExtractor,
    Boxed,
    ExactAnswer,
    LastNumber,
    MathAnswer,
    Reward,
    same_answer,
)
from lightning_lm.rewards.expressions import ExpressionError, parse_expression, same_value
from lightning_lm.rewards.scoring import RewardError, RewardFailure, RewardTable, Scoring, reward_name, score
from lightning_lm.rewards.shape import FormatTags, LengthReward, OverlongPenalty

__all__ = [
    "AfterHashes",
    "AnswerExtractor",
    "Boxed",
    "ExactAnswer",
    "ExpressionError",
    "FormatTags",
    "LastNumber",
    "LengthReward",
    "MathAnswer",
    "OverlongPenalty",
    "Reward",
    "RewardError",
    "RewardFailure",
    "RewardTable",
    "Scoring",
    "parse_expression",
    "reward_name",
    "same_answer",
    "same_value",
    "score",
]
