"""Objectives over packed rows: each row of a stream is rewritten by an objective, again and again in other ways.

A row's random choices depend on the seed and on the row's index in the endless stream, which counts rows and epochs:
every epoch hides other tokens, and a run that is resumed hides those that it would have hidden.
"""

import abc
import functools
import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.objectives.denoising import Denoiser, Example
from lightning_lm.data.objectives.masked import MaskedLM, MaskedRow
from lightning_lm.data.objectives.vocabulary import Vocabulary
from lightning_lm.data.permutation import key_of
from lightning_lm.data.stream import TokenStream
from lightning_lm.parts import Part
from lightning_lm.types import IGNORE_INDEX

__all__ = ["MaskedStream", "PrefixStream", "SourceTargetStream"]

Ints = NDArray[np.int64]
Rows = dict[str, Ints]
_WIDTH_STEP = 8
"""Rows of different lengths are padded to a multiple of it."""


class _ObjectiveStream(abc.ABC):
    """Rows of a stream, rewritten by an objective.

    Args:
        stream: The rows.
        objective: The objective; `None` if the labels of the rows tell the targets.
        vocabulary: Facts about the tokenizer.
        seed: Seed of the random choices.
    """

    def __init__(self, stream: TokenStream, objective: Part | None, vocabulary: Vocabulary, seed: int) -> None:
        self._stream, self._vocabulary, self._seed = stream, vocabulary, seed
        self._objective_part = objective
        self.rows_per_epoch = stream.rows_per_epoch

    @abc.abstractmethod
    def batch(self, indices: Ints) -> Rows:
        """Return the rows with these indices, rewritten."""

    @functools.cached_property
    def description(self) -> dict[str, object]:
        """Everything that decides the rows, by name."""
        part = self._objective_part
        settings = None if part is None else part.to_dict()
        return {**self._stream.description, "objective": [type(self).__name__, settings, self._seed]}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of `description`."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key_of("objective", self._seed, index)))


class MaskedStream(_ObjectiveStream):
    """Rows with hidden tokens, as `lightning_lm.types.MaskedBatch` describes; each token is a candidate exactly once.

    Args:
        stream: The rows.
        objective: Choice of the targets and their replacement.
        vocabulary: Facts about the tokenizer.
        seed: Seed of the random choices.

    Raises:
        ConfigurationError: If the tokenizer has no mask token.
    """

    def __init__(self, stream: TokenStream, objective: MaskedLM, vocabulary: Vocabulary, *, seed: int = 0) -> None:
        super().__init__(stream, objective, vocabulary, seed)
        self._objective = objective
        vocabulary.mask_id  # noqa: B018  (refused here, before the first row)
        self._ordinary = np.zeros(len(vocabulary.starts_word), dtype=np.bool_)
        self._ordinary[vocabulary.ordinary] = True

    def batch(self, indices: Ints) -> Rows:
        """Return the rows with these indices, each field int64 [rows, row_length]."""
        rows = self._stream.batch(indices)
        candidates = (rows["labels"] != IGNORE_INDEX) & self._ordinary[rows["input_ids"]]
        for place, index in enumerate(indices.tolist()):
            row = MaskedRow(rows["input_ids"][place], candidates[place], rows["document_ids"][place])
            inputs, labels = self._objective.apply(row, self._vocabulary, self._generator(index))
            rows["input_ids"][place], rows["labels"][place] = inputs, labels
        return rows


class _ExampleStream(_ObjectiveStream):
    """Rows of sources and targets, made of the documents of packed rows.

    Args:
        stream: The rows; of a `SupervisedStore` if there is no denoiser.
        denoiser: Makes source and target of each text; ``None`` if the labels tell the target.
        vocabulary: Facts about the tokenizer.
        begin_id: Id before each target; in front of a text, or of a source, of the stream it is dropped.
        seed: Seed of the random choices.
    """

    def __init__(
        self, stream: TokenStream, denoiser: Denoiser | None, vocabulary: Vocabulary, *, begin_id: int, seed: int = 0
    ) -> None:
        super().__init__(stream, denoiser, vocabulary, seed)
        self._denoiser, self._begin = denoiser, np.array([begin_id])
        end = vocabulary.eos_id
        self._end = np.array([] if end is None else [end], dtype=np.int64)

    def _examples(self, indices: Ints) -> list[list[Example]]:
        """Return the sources and targets of each row, a target with its end-of-text token if the text ends there."""
        rows = self._stream.batch(indices)
        return [
            self._row_examples(rows["input_ids"][place], rows["labels"][place], rows["document_ids"][place], index)
            for place, index in enumerate(indices.tolist())
        ]

    def _row_examples(self, ids: Ints, labels: Ints, documents: Ints, index: int) -> list[Example]:
        rng, examples = self._generator(index), []
        edges = np.flatnonzero(np.diff(documents)) + 1
        for cells, targets in zip(np.split(ids, edges), np.split(labels != IGNORE_INDEX, edges), strict=True):
            if not targets.any():  # padding
                continue
            if self._denoiser is None:
                first = int(targets.argmax())
                marked = int(first > 1 and cells[0] == self._begin[0])
                examples.append(Example(cells[marked:first], cells[first:]))
                continue
            text = cells[targets]
            ends = text[-1:] if len(self._end) and text[-1] == self._end[0] else text[:0]
            text = text[: len(text) - len(ends)]
            if len(text):
                source, target = self._denoiser.apply(text, self._vocabulary, rng)
                examples.append(Example(source, np.concatenate([target, self._end])))
        return examples


class SourceTargetStream(_ExampleStream):
    """Rows for an encoder-decoder, as `lightning_lm.types.Seq2SeqBatch` describes.

    Target i of a row belongs to source i. Rows are as wide as the longest of a batch needs.
    """

    def batch(self, indices: Ints) -> Rows:
        """Return the rows with these indices, each field int64 [rows, width]."""
        examples = self._examples(indices)
        sources = [[np.concatenate([source, self._end]) for source, _ in row] for row in examples]
        targets = [[np.concatenate([self._begin, target]) for _, target in row] for row in examples]
        labels = [[np.append(IGNORE_INDEX, target) for _, target in row] for row in examples]
        number = [[np.full(len(target), n) for n, target in enumerate(row)] for row in targets]
        source_number = [[np.full(len(source), n) for n, source in enumerate(row)] for row in sources]
        return {
            "input_ids": _padded(targets, 0),
            "labels": _padded(labels, IGNORE_INDEX),
            "document_ids": _padded(number, None),
            "source_ids": _padded(sources, 0),
            "source_document_ids": _padded(source_number, None),
        }


class PrefixStream(_ExampleStream):
    """Rows for a decoder that reads each source as a prefix and writes its target, as `TokenBatch` describes.

    ``prefix_lengths`` has, for each token, the tokens of its document that see each other in both directions.
    """

    def batch(self, indices: Ints) -> Rows:
        """Return the rows with these indices, each field int64 [rows, width]."""
        examples = self._examples(indices)
        rows = [[np.concatenate([self._begin, *example]) for example in row] for row in examples]
        labels, prefixes, numbers = [], [], []
        for row, texts in zip(examples, rows, strict=True):
            starts = [1 + len(source) for source, _ in row]
            labels.append(
                [np.concatenate([np.full(n, IGNORE_INDEX), text[n:]]) for n, text in zip(starts, texts, strict=True)]
            )
            prefixes.append([np.full(len(text), n) for n, text in zip(starts, texts, strict=True)])
            numbers.append([np.full(len(text), n) for n, text in enumerate(texts)])
        return {
            "input_ids": _padded(rows, 0),
            "labels": _padded(labels, IGNORE_INDEX),
            "document_ids": _padded(numbers, None),
            "prefix_lengths": _padded(prefixes, 0),
        }


def _padded(rows: list[list[Ints]], fill: int | None) -> Ints:
    """Return rows of pieces as one array; the padding of a row is its number of pieces if no fill is given."""
    longest = max((sum(map(len, row)) for row in rows), default=0)
    width = max(-(-longest // _WIDTH_STEP) * _WIDTH_STEP, _WIDTH_STEP)
    out = np.empty((len(rows), width), dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
        used = sum(map(len, row))
        line[used:] = len(row) if fill is None else fill
        if row:
            line[:used] = np.concatenate(row)
    return out
