"""Evaluation of language models: perplexity, bits per byte, and the compressors these stand beside."""

from lightning_lm.evals.compression import gzip_bits_per_byte, token_counts, unigram_bits_per_byte, xz_bits_per_byte
from lightning_lm.evals.pass_at import pass_at
from lightning_lm.evals.perplexity import TextScore, evaluate_perplexity

__all__ = [
    "TextScore",
    "evaluate_perplexity",
    "gzip_bits_per_byte",
    "pass_at",
    "token_counts",
    "unigram_bits_per_byte",
    "xz_bits_per_byte",
]
