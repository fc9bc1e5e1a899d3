"""Evaluation tasks: general parts that YAML can name, and the published tasks made of them."""

from lightning_lm.evals.tasks.choice import ChoiceTask, score_choices
from lightning_lm.evals.tasks.continuation import ContinuationTask
from lightning_lm.evals.tasks.few_shot import FirstShots, RandomShots, Shots
from lightning_lm.evals.tasks.generation_task import GenerationTask
from lightning_lm.evals.tasks.ifeval import FollowsAll, IFEval, loose_variants
from lightning_lm.evals.tasks.mmlu import MMLU, MMLUPro
from lightning_lm.evals.tasks.multiple_choice import ARC, PIQA, BoolQ, HellaSwag, OpenBookQA, WinoGrande
from lightning_lm.evals.tasks.perplexity_task import PerplexityTask
from lightning_lm.evals.tasks.programs import MBPP, HumanEval
from lightning_lm.evals.tasks.questions import GSM8K, MATH, TriviaQA
from lightning_lm.evals.tasks.record_task import RecordTask
from lightning_lm.evals.tasks.registry import by_name, names, task_from_yaml
from lightning_lm.evals.tasks.standard_library import DocsChoice, DocsCloze
from lightning_lm.evals.tasks.synthetic import Arithmetic, Reverse
from lightning_lm.evals.tasks.texts import LAMBADA, WikiText
from lightning_lm.evals.tasks.verdicts import AnswerCheck, Check, RewardCheck, SameAnswer, SameText, SameValue, Verdict

__all__ = [
    "ARC",
    "GSM8K",
    "LAMBADA",
    "MATH",
    "MBPP",
    "MMLU",
    "PIQA",
    "AnswerCheck",
    "Arithmetic",
    "BoolQ",
    "Check",
    "ChoiceTask",
    "ContinuationTask",
    "DocsChoice",
    "DocsCloze",
    "FirstShots",
    "FollowsAll",
    "GenerationTask",
    "HellaSwag",
    "HumanEval",
    "IFEval",
    "MMLUPro",
    "OpenBookQA",
    "PerplexityTask",
    "RandomShots",
    "RecordTask",
    "Reverse",
    "RewardCheck",
    "SameAnswer",
    "SameText",
    "SameValue",
    "Shots",
    "TriviaQA",
    "Verdict",
    "WikiText",
    "WinoGrande",
    "by_name",
    "loose_variants",
    "names",
    "score_choices",
    "task_from_yaml",
]
