"""The end of a run: the model beside gzip and xz, where everything lies, and what to type next."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Group, RenderableType

from lightning_lm.callbacks.formatting import short
from lightning_lm.callbacks.hooks import Attempt, emit, reason_of
from lightning_lm.callbacks.run_report import RunReport
from lightning_lm.evals.compression import (
    compression_table,
    gzip_bits_per_byte,
    token_counts,
    unigram_bits_per_byte,
    xz_bits_per_byte,
)
from lightning_lm.evals.ngram import evaluate_ngram
from lightning_lm.models.ngram import fit_ngram
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.protocols import Tokenizer

__all__ = ["CompressionReport"]

_NGRAM_TOKENS = 10_000_000
_NGRAM = "-gram over tokens"
_BETTER = (
    "The n-gram model has read all of the training text; a network passes it on more text, with more steps, or larger."
)


class CompressionReport(RunReport):
    """Compare the model's validation bits per byte with gzip, xz and n-gram models, and print the next commands.

    A language model is a compressor: its loss in bits per byte is the size to which it would compress the validation
    text. It is compared with ``gzip -9`` and ``xz -9`` of the same text, concatenated, and with a unigram model, the
    entropy of its tokens under their frequencies in the training text (in the validation text if the datamodule has no
    ``train_token_counts()``), and, if it has ``train_documents()``, with an n-gram model of the training text: on a
    small text that beats a small network, which has to be trained longer or be larger to pass it. The values also go
    to the loggers (``report/gzip_bits_per_byte``, ``report/ngram_bits_per_byte``, ...).

    It needs `Perplexity` for the model's own value and a datamodule with ``validation_texts()``; without texts the
    results are those of `RunReport`, as checkpoint, logs and commands are, and the validation after the last step.

    Args:
        max_bytes: Longest prefix of the validation text to compress; xz takes about a second per megabyte.
        ngram_order: Tokens of the n-gram model's longest n-gram, counted in the first 10 million tokens, which takes
            about a second per million; 0 for none.
        prompt: Prompt of the ``generate`` command that is shown; by default one from the validation data.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import CompressionReport, Perplexity
        >>> trainer = Trainer(callbacks=[Perplexity(), CompressionReport()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, max_bytes: int = 32_000_000, ngram_order: int = 5, prompt: str | None = None) -> None:
        super().__init__(prompt=prompt)
        check_numbers(
            {"max_bytes": Limit.COUNT, "ngram_order": Limit.NON_NEGATIVE},
            {"max_bytes": max_bytes, "ngram_order": ngram_order},
        )
        self._max_bytes, self._ngram_order = max_bytes, ngram_order

    def _results(self, trainer: Trainer) -> RenderableType | None:
        """Compress and log."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        values: dict[str, float] = {}
        with Attempt() as attempt:  # a user's own datamodule
            texts = list(_beginning(_validation_texts(trainer), self._max_bytes))
            values = _compressed(texts, getattr(datamodule, "tokenizer", None), datamodule) if any(texts) else {}
            if values and self._ngram_order:
                values.update(_ngram(texts, datamodule, self._ngram_order))
        if attempt.error is not None:
            rank_zero_warn(f"CompressionReport compares nothing in this run ({reason_of(attempt.error)})")
        if not values:
            return super()._results(trainer)
        emit(trainer, {f"report/{_key(name)}_bits_per_byte": value for name, value in values.items()})
        model = trainer.callback_metrics.get("val/bits_per_byte")
        if model is None:
            notes = "The model itself was not measured: there was no validation with Perplexity."
        else:
            ngram = min((value for name, value in values.items() if name.endswith(_NGRAM)), default=math.inf)
            notes, values[self._model_name(trainer)] = _BETTER if ngram < float(model) else "", float(model)
        size = short(sum(len(text.encode()) for text in texts))
        title = f"Bits per byte of the validation text ({size}B), less is better"
        return Group(compression_table(values, title, ours="this model"), *([notes] if notes else []))

    def _model_name(self, trainer: Trainer) -> str:
        late = self._validated_step in (None, trainer.global_step)
        return "this model" if late else f"this model at step {self._validated_step:,}"


def _validation_texts(trainer: Trainer) -> Iterable[str]:
    texts = getattr(trainer.datamodule, "validation_texts", None)  # type: ignore[attr-defined]
    return () if texts is None else texts()


def _beginning(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    room = max_bytes
    for text in texts:
        if room <= 0:
            return
        yield text[:room]
        room -= len(text.encode())


def _compressed(texts: list[str], tokenizer: Tokenizer | None, datamodule: Any) -> dict[str, float]:
    data = "".join(texts).encode()
    values = {"gzip -9": gzip_bits_per_byte(data), "xz -9": xz_bits_per_byte(data)}
    if tokenizer is not None:
        counts = token_counts(np.concatenate(tokenizer.encode_batch(texts)), tokenizer.vocab_size)
        if tokenizer.eos_id is not None:
            counts[tokenizer.eos_id] += len(texts)  # the model has to predict where a document ends, too
        known = datamodule.train_token_counts() if hasattr(datamodule, "train_token_counts") else counts
        values["unigram over tokens"] = unigram_bits_per_byte(known, counts, len(data))
    return values


def _ngram(texts: list[str], datamodule: Any, order: int) -> dict[str, float]:
    """Return the bits per byte of an n-gram model of the training text, if the datamodule has that."""
    tokenizer: Tokenizer | None = getattr(datamodule, "tokenizer", None)
    if tokenizer is None or not hasattr(datamodule, "train_documents"):
        return {}
    parts, room = [], _NGRAM_TOKENS
    for tokens, ends in datamodule.train_documents():
        kept = np.minimum(ends[: max(1, int(np.searchsorted(ends, room, side="right")))], room)
        if room > 0:
            parts.append((tokens[: kept[-1]], kept))
            room -= int(kept[-1])
    model = fit_ngram(parts, order=order, vocab_size=tokenizer.vocab_size)
    return {f"{order}{_NGRAM}": evaluate_ngram(model, texts, tokenizer).bits_per_byte}


def _key(name: str) -> str:
    return "ngram" if name.endswith(_NGRAM) else name.split()[0]
