"""Comparison of tokenizers on the same text."""

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers.base import BaseTokenizer

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Measurement", "comparison_table", "measure", "take_sample"]


class Measurement(NamedTuple):
    """Measurement of one tokenizer on a text."""

    vocab_size: int
    bytes_per_token: float
    """The compression ratio: UTF-8 bytes of text for each token."""
    unknown_rate: float
    """Tokens that stand for text which the vocabulary does not hold, as a fraction of all."""
    exact: bool
    """True if decoding gives the text back."""
    megabytes_per_s: float
    """Speed of encoding."""


def measure(tokenizer: BaseTokenizer, texts: Iterable[str]) -> Measurement:
    """Encode and decode texts, and count.

    Raises:
        TokenizerError: If the texts are empty.
    """
    num_bytes = num_tokens = num_unknown = 0
    seconds, exact = 0.0, True
    tokenizer.encode(" ")  # the tables that are built on first use are not timed
    for text in texts:
        begin = time.perf_counter()
        ids = tokenizer.encode(text)
        seconds += time.perf_counter() - begin
        num_bytes += len(text.encode())
        num_tokens += len(ids)
        num_unknown += 0 if tokenizer.unk_id is None else ids.count(tokenizer.unk_id)
        exact = exact and tokenizer.decode(ids) == text
    if not num_tokens:
        raise TokenizerError("There is no text to compare tokenizers on: the input is empty.")
    speed = num_bytes / 1e6 / max(seconds, 1e-9)
    return Measurement(tokenizer.vocab_size, num_bytes / num_tokens, num_unknown / num_tokens, exact, speed)


def comparison_table(tokenizers: Mapping[str, BaseTokenizer], texts: list[str]) -> "Table":
    """Return a table with a row for each tokenizer."""
    from rich.table import Table

    size = sum(len(text.encode()) for text in texts)
    table = Table(title=f"{size / 1e6:,.2f} MB of text, {len(texts):,} documents")
    table.add_column("tokenizer", overflow="fold")
    for heading in ("vocabulary", "bytes/token", "unknown", "exact", "MB/s"):
        table.add_column(heading, justify="right")
    for name, tokenizer in tokenizers.items():
        row = measure(tokenizer, texts)
        table.add_row(
            name,
            f"{row.vocab_size:,}",
            f"{row.bytes_per_token:.3f}",
            f"{row.unknown_rate:.2%}",
            "yes" if row.exact else "no",
            f"{row.megabytes_per_s:.1f}",
        )
    return table


def take_sample(documents: Iterable[str], *, max_bytes: int) -> list[str]:
    """Return the first documents, the last of them cut where the sample is full.

    Args:
        documents: Texts, of which no more are read than are needed.
        max_bytes: Size of the sample as UTF-8.
    """
    sample: list[str] = []
    left = max_bytes
    for document in documents:
        data = document.encode()
        sample.append(document if len(data) <= left else data[:left].decode(errors="ignore"))
        left -= len(data)
        if left <= 0:
            break
    return list(filter(None, sample))
