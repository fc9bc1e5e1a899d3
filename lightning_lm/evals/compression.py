"""Bits per byte of well-known compressors, to compare a language model with."""

import gzip
import lzma
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_lm.errors import DataError

__all__ = ["compression_table", "gzip_bits_per_byte", "token_counts", "unigram_bits_per_byte", "xz_bits_per_byte"]

_CHUNK = 1 << 22
_BAR_CELLS = 30


def gzip_bits_per_byte(data: bytes) -> float:
    """Return the size of ``gzip -9`` of the data, in bits per byte of data.

    Deflate looks back 32 kB and counts symbols: the cost of a file without a model of the language. Header included.

    Args:
        data: All text, concatenated, as UTF-8 bytes.

    Raises:
        DataError: If there is no data.
    """
    return _bits_per_byte(len(gzip.compress(data, compresslevel=9, mtime=0)), data)


def xz_bits_per_byte(data: bytes) -> float:
    """Return the size of ``xz -9`` of the data, in bits per byte of data.

    LZMA looks back over all of it and predicts each bit from its context. Container included.

    Args:
        data: All text, concatenated, as UTF-8 bytes.

    Raises:
        DataError: If there is no data.
    """
    return _bits_per_byte(len(lzma.compress(data, preset=9)), data)


def token_counts(ids: np.ndarray | Iterable[int], vocab_size: int) -> np.ndarray:
    """Return how often each token id occurs, in bounded memory also for a memory-mapped store.

    Args:
        ids: Token ids, one array of any integer type or any iterable of ids.
        vocab_size: Number of ids.

    Returns:
        int64 [vocab_size].

    Raises:
        DataError: If an id lies outside ``range(vocab_size)``.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in _chunks(ids):
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise DataError(f"Token id {bad} does not fit vocab_size={vocab_size}; was it made by another tokenizer?")
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def unigram_bits_per_byte(train_counts: np.ndarray, validation_counts: np.ndarray, num_bytes: int) -> float:
    """Return the cost of validation tokens under the frequencies of the training tokens, in bits per byte.

    This is what a model knows that has learned which tokens are frequent and nothing of their order. Each count is
    raised by one (Laplace), so that a token unseen in training has a finite cost.

    Args:
        train_counts: Occurrences of each id in the training text, int [vocab]; see `token_counts`.
        validation_counts: The same for the validation text.
        num_bytes: UTF-8 bytes of the validation text.

    Raises:
        DataError: If the vocabularies differ or there is nothing to measure.
    """
    if train_counts.shape != validation_counts.shape:
        raise DataError(
            f"The counts are of two vocabularies: {train_counts.shape} for training, {validation_counts.shape} for "
            "validation. Count both with the same tokenizer."
        )
    if num_bytes <= 0 or not validation_counts.any():
        raise DataError("There is no validation text to measure; give at least one token and one byte.")
    probabilities = (train_counts.astype(np.float64) + 1.0) / (float(train_counts.sum()) + train_counts.size)
    seen = validation_counts > 0
    nll_nats = -(validation_counts[seen] * np.log(probabilities[seen])).sum()
    return float(nll_nats) / math.log(2.0) / num_bytes


def compression_table(values: Mapping[str, float], title: str, *, ours: str) -> Group:
    """Return values in bits per byte as rows with bars, the best one first.

    Args:
        values: Bits per byte by the name of the row.
        title: Heading.
        ours: Rows whose name begins so stand out.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        style = "bold green" if name.startswith(ours) else ""
        bar = "━" * max(1, round(_BAR_CELLS * value / max(values.values())))
        table.add_row(f"  {name}", f"{value:.3f}", Text(bar, style or "bright_black"), style=style)
    return Group(Text(f"\n{title}", "bold"), table)


def _bits_per_byte(compressed_bytes: int, data: bytes) -> float:
    if not data:
        raise DataError("There is no text to compress; bits per byte needs at least one byte.")
    return 8.0 * compressed_bytes / len(data)


def _chunks(ids: np.ndarray | Iterable[int]) -> Iterator[np.ndarray]:
    array = ids if isinstance(ids, np.ndarray) else np.fromiter(ids, dtype=np.int64)
    for start in range(0, array.size, _CHUNK):
        yield array.reshape(-1)[start : start + _CHUNK]
