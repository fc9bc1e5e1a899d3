"""Evaluation of language models: perplexity, bits per byte, and the compressors these stand beside."""

from lightning_lm.evals.compression import gzip_bits_per_byte, token_counts, unigram_bits_per_byte, xz_bits_per_byte
from lightning_lm.evals.local_model import LocalModel
from lightning_lm.evals.pass_at import pass_at
from lightning_lm.evals.perplexity import TextScore, evaluate_perplexity
from lightning_lm.evals.requests import (
    Completions,
    EvaluatedModel,
    Generation,
    Likelihood,
    LogLikelihood,
    Prompt,
    Request,
    RollingLikelihood,
    Shot,
)
from lightning_lm.evals.results import ItemResult, Results, TaskResults, compare_results
from lightning_lm.evals.runner import evaluate_tasks
from lightning_lm.evals.statistics import (
    PairedDifference,
    Score,
    mcnemar_p_value,
    paired_difference,
    score_of,
    standard_error,
    wilson_interval,
)
from lightning_lm.evals.task import Answer, Item, Task

__all__ = [
    "Answer",
    "Completions",
    "EvaluatedModel",
    "Generation",
    "Item",
    "ItemResult",
    "Likelihood",
    "LocalModel",
    "LogLikelihood",
    "PairedDifference",
    "Prompt",
    "Request",
    "Results",
    "RollingLikelihood",
    "Score",
    "Shot",
    "Task",
    "TaskResults",
    "TextScore",
    "compare_results",
    "evaluate_perplexity",
    "evaluate_tasks",
    "gzip_bits_per_byte",
    "mcnemar_p_value",
    "paired_difference",
    "pass_at",
    "score_of",
    "standard_error",
    "token_counts",
    "unigram_bits_per_byte",
    "wilson_interval",
    "xz_bits_per_byte",
]
