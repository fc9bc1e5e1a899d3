"""How good a model is: perplexity, bits per byte, and the compressors these stand beside."""

from lightning_lm.evals.compression import gzip_bits_per_byte, token_counts, unigram_bits_per_byte, xz_bits_per_byte

__all__ = ["gzip_bits_per_byte", "token_counts", "unigram_bits_per_byte", "xz_bits_per_byte"]
