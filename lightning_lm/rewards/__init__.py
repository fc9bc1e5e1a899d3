"""Rewards that can be verified, shared by reinforcement learning and evaluation."""

from lightning_lm.rewards.answers import ExactAnswer, MathAnswer, Reward, same_answer
from lightning_lm.rewards.code import CodeOutput, CodeTests, extract_code
from lightning_lm.rewards.environment import EnvironmentReward
from lightning_lm.rewards.expressions import ExpressionError, parse_expression, same_value
from lightning_lm.rewards.extractors import (
    AfterHashes,
    AnswerExtractor,
    AnswerPattern,
    AnswerPhrase,
    AnswerTags,
    Boxed,
    LastNumber,
    OptionLetter,
)
from lightning_lm.rewards.judge import Comparison, Grade, JudgeQuestion, LLMJudge
from lightning_lm.rewards.reasoning_gym import ReasoningGymAnswer
from lightning_lm.rewards.sandbox import Sandbox, SandboxResult
from lightning_lm.rewards.scoring import (
    RewardError,
    RewardFailure,
    RewardTable,
    Scoring,
    check_reward,
    check_weights,
    reward_name,
    score,
)
from lightning_lm.rewards.shape import FormatTags, LengthReward, OverlongPenalty

__all__ = [
    "AfterHashes",
    "AnswerExtractor",
    "AnswerPattern",
    "AnswerPhrase",
    "AnswerTags",
    "Boxed",
    "CodeOutput",
    "CodeTests",
    "Comparison",
    "EnvironmentReward",
    "ExactAnswer",
    "ExpressionError",
    "FormatTags",
    "Grade",
    "JudgeQuestion",
    "LLMJudge",
    "LastNumber",
    "LengthReward",
    "MathAnswer",
    "OptionLetter",
    "OverlongPenalty",
    "ReasoningGymAnswer",
    "Reward",
    "RewardError",
    "RewardFailure",
    "RewardTable",
    "Sandbox",
    "SandboxResult",
    "Scoring",
    "check_reward",
    "check_weights",
    "extract_code",
    "parse_expression",
    "reward_name",
    "same_answer",
    "same_value",
    "score",
]
