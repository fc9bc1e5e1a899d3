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
from lightning_lm.evals.task import Answer, Item, Task

__all__ = [
    "Answer",
    "Completions",
    "EvaluatedModel",
    "Generation",
    "Item",
    "Likelihood",
    "LocalModel",
    "LogLikelihood",
    "Prompt",
    "Request",
    "RollingLikelihood",
    "Shot",
    "Task",
    "TextScore",
    "evaluate_perplexity",
    "gzip_bits_per_byte",
    "pass_at",
    "token_counts",
    "unigram_bits_per_byte",
    "xz_bits_per_byte",
]
