"""Unpaired preferences as rows of tokens: single completions, each desirable or not, for KTO.

KTO compares each completion with how far the policy has moved on completions that do not belong to their prompts. These
mismatched rows are made as TRL makes them, by giving each prompt of an optimizer step the completion before it; so they
depend on the step alone, and not on ranks or micro-batches.
"""

import functools
import hashlib
import json
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.permutation import key_of, permute
from lightning_lm.data.post_training.chat import ChatTemplate, encode_pair
from lightning_lm.data.post_training.examples import ExampleSource
from lightning_lm.data.post_training.forms import Record, by_content, label_of, unknown_form
from lightning_lm.data.post_training.implicit_prompts import split_preference
from lightning_lm.data.post_training.preference import PairRows
from lightning_lm.errors import ConfigurationError, DataError, TokenizerError
from lightning_lm.protocols import Tokenizer
from lightning_lm.types import IGNORE_INDEX

__all__ = ["UnpairedExamples", "UnpairedStream", "unpaired"]

Ints = NDArray[np.int64]


def unpaired(record: Record) -> list[tuple[Any, Any, bool]]:
    """Return prompt, completion and label of a record: one of each, or two of a preference, the preferred first.

    Args:
        record: Has ``prompt``, ``completion`` and ``label``, or is a preference; see `data.post_training.forms`.

    Raises:
        DataError: If it is neither, or its label is neither true nor false.
    """
    record = by_content(record)
    if record.get("prompt") is not None and record.get("completion") is not None and record.get("label") is not None:
        label = label_of(record)
        if label is None:
            raise DataError(f"label is {record['label']!r}; true or false is needed.")
        return [(record["prompt"], record["completion"], label)]
    if record.get("chosen") is not None and record.get("rejected") is not None:
        prompt, chosen, rejected = split_preference(record)
        return [(prompt, chosen, True), (prompt, rejected, False)]
    raise unknown_form(record, "a completion with its label, or a preference", ("unpaired", "preference"))


class UnpairedExamples:
    """Encoded completions with their prompts and labels, kept in memory in 4 bytes a token.

    Args:
        source: Records of completions with labels, or of preferences.
        tokenizer: Gives the ids.
        template: Chat template, renders conversations as text.
        rows: Longest row, and treatment of longer ones.

    Attributes:
        desirable: bool [examples].
        too_long: Completions left out because of their length.
        bad: Records left out because they cannot be used.

    Raises:
        DataError: If a record cannot be used, or all completions have the same label.
    """

    def __init__(self, source: ExampleSource, tokenizer: Tokenizer, template: ChatTemplate, rows: PairRows) -> None:
        tokens, ends, labels = array("I"), array("q"), []
        self.too_long, bad = 0, source.policy()
        for place, record in source.placed(bad):
            try:
                written = template.for_record(record)
                encoded = [
                    (*encode_pair(prompt, completion, tokenizer, written, rows.max_length), label)
                    for prompt, completion, label in unpaired(record)
                ]
            except (DataError, TokenizerError) as error:
                refused = DataError(f"{place}: {error}")
                refused.__cause__ = error
                bad.add(refused)
                continue
            for prompt_ids, completion_ids, is_cut, label in encoded:
                if not completion_ids or (is_cut and rows.too_long == "drop"):
                    self.too_long += 1
                    continue
                for ids in (prompt_ids, completion_ids):
                    tokens.extend(ids)
                    ends.append(len(tokens))
                labels.append(label)
        bad.report("the completions")
        self.bad, self.desirable = bad.count, np.array(labels, dtype=np.bool_)
        if not len(labels) or self.desirable.all() or not self.desirable.any():
            raise DataError(
                f"Of {len(labels):,} completions {int(self.desirable.sum()):,} are desirable, and {self.too_long:,} "
                "were dropped because of their length; KTO needs some that are desirable and some that are not."
            )
        self._tokens = np.array(tokens, dtype=np.uint32)
        self._ends = np.array(ends, dtype=np.int64)
        self._pad_id = tokenizer.eos_id or 0
        self._max_length = rows.max_length

    def __len__(self) -> int:
        """Return the number of completions."""
        return len(self.desirable)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of all ids and labels."""
        digest = hashlib.sha256()
        for values in (self._tokens, self._ends, self.desirable):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def part(self, number: int) -> Ints:
        """Return the ids of prompt ``number / 2``, or of its completion if the number is odd.

        Args:
            number: At least 0.
        """
        first = int(self._ends[number - 1]) if number else 0
        return self._tokens[first : int(self._ends[number])].astype(np.int64)

    def rows(self, prompts: Ints, completions: Ints) -> dict[str, NDArray[Any]]:
        """Return rows of prompts with completions, padded on the right; a mismatched row may be cut at its end.

        Args:
            prompts: Indices of the prompts.
            completions: Indices of the completions that follow them.
        """
        pairs = [
            (self.part(2 * prompt), self.part(2 * completion + 1))
            for prompt, completion in zip(prompts.tolist(), completions.tolist(), strict=True)
        ]
        width = min(self._max_length, max(len(prompt) + len(completion) for prompt, completion in pairs))
        input_ids = np.full((len(pairs), width), self._pad_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        for row, (prompt, completion) in enumerate(pairs):
            ids = np.concatenate([prompt, completion])[:width]
            input_ids[row, : len(ids)] = ids
            labels[row, len(prompt) : len(ids)] = ids[len(prompt) :]
        places = np.broadcast_to(np.arange(width), input_ids.shape).copy()
        return {"input_ids": input_ids, "labels": labels, "position_ids": places}


class UnpairedStream:
    """Completions epoch after epoch, each in a new order: completion ``i`` is a pure function of data, seed and ``i``.

    Args:
        examples: Encoded examples.
        seed: Seed of the order.
        shuffle: False keeps the order of the data.
        step_size: Completions of an optimizer step, among which mismatched rows are made.

    Raises:
        ConfigurationError: If a step has a single completion, which cannot be mismatched.
    """

    def __init__(self, examples: UnpairedExamples, *, seed: int = 0, shuffle: bool = True, step_size: int = 64) -> None:
        if step_size < 2:
            raise ConfigurationError(
                f"KTO needs at least 2 completions a step to mismatch, got batch_size={step_size}."
            )
        self._examples, self._seed, self._shuffle, self._step_size = examples, seed, shuffle, step_size
        self.rows_per_epoch = len(examples)

    @functools.cached_property
    def description(self) -> dict[str, object]:
        """Everything that decides the rows, by name; two streams are equal if and only if these are equal."""
        return {"completions": self._examples.fingerprint, "seed": self._seed, "shuffle": self._shuffle}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of `description`."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def batch(self, indices: Ints) -> dict[str, NDArray[Any]]:
        """Return the rows with these places in the endless order, as a `types.UnpairedBatch` without mismatched rows.

        Args:
            indices: At least 0.
        """
        numbers = self.locate(indices)
        return {**self._examples.rows(numbers, numbers), "desirable": self._examples.desirable[numbers]}

    def step_batch(self, indices: Ints) -> dict[str, NDArray[Any]]:
        """Return the mismatched rows of one rank in a step: each prompt with the completion before it in the step.

        Args:
            indices: Places of the rank's rows in the endless order, all of one step.
        """
        first = indices // self._step_size * self._step_size
        before = first + (indices - first - 1) % self._step_size
        rows = self._examples.rows(self.locate(indices), self.locate(before))
        return {f"mismatched_{name}": values for name, values in rows.items()}

    def locate(self, indices: Ints) -> Ints:
        """Return the number of the completion at each place.

        Args:
            indices: At least 0.
        """
        epochs, places = np.divmod(indices, self.rows_per_epoch)
        if not self._shuffle:
            return np.asarray(places)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            numbers[inside] = permute(places[inside], self.rows_per_epoch, key_of("unpaired", self._seed, epoch))
        return numbers
