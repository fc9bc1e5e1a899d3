"""Prompts of rollouts: token ids for the policy, text and columns for the rewards, in an endless reproducible order."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.permutation import key_of, permute
from lightning_lm.data.post_training.chat import ChatTemplate
from lightning_lm.data.post_training.curriculum import Curriculum, LevelState
from lightning_lm.data.post_training.examples import Examples, ExampleSource
from lightning_lm.data.post_training.forms import Record, by_content, unknown_form
from lightning_lm.data.post_training.messages import checked_text, messages_of
from lightning_lm.errors import DataError, TokenizerError
from lightning_lm.protocols import Tokenizer

__all__ = ["RESERVED_COLUMNS", "LeveledPrompts", "PromptBatch", "PromptStream", "join_prompts", "take_prompts"]

Ints = NDArray[np.int64]

RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
"""Names of the arguments that rewards are given besides the columns of the data."""


class PromptBatch(TypedDict):
    """Prompts of a rollout, as lists and not tensors: nothing of it is needed on the model's device."""

    prompt_ids: list[Ints]
    """Token ids of each prompt, int64."""
    prompts: list[Any]
    """The same as it stands in the data, a text or a list of messages, for rewards."""
    texts: list[str]
    """The same as text, for people."""
    columns: dict[str, list[Any]]
    """The other fields of the records; ``None`` where a record lacks one."""
    stop_ids: tuple[int, ...]
    """Ids that end a completion."""
    counted: list[bool]
    """Mask of the prompts that are measured; the others only fill a batch up, so that all ranks have equally many."""


class PromptStream:
    """Prompts epoch after epoch, each epoch in a new order: prompt ``i`` is a pure function of records, seed and ``i``.

    All prompts are tokenized at the start, so that one that cannot be written ends no run in its middle.

    Args:
        records: Each has a ``prompt``; other fields are columns for the rewards. Or their source.
        tokenizer: Tokenizer of the model.
        template: Chat template, renders conversations as text.
        max_tokens: Length above which prompts are dropped; ``None`` keeps all.
        seed: Seed of the order.
        shuffle: False keeps the order of the records.

    Attributes:
        rows_per_epoch: Number of prompts.
        too_long: Number of dropped prompts.

    Raises:
        DataError: If there is no record, one has no prompt, or a field has a name that rewards know otherwise.
    """

    def __init__(
        self,
        records: ExampleSource | Iterable[Record],
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        max_tokens: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self._tokenizer, self._template, self._seed, self._shuffle = tokenizer, template, seed, shuffle
        source = records if isinstance(records, ExampleSource) else Examples(source=records)
        bad = source.policy()
        self._records: list[Record] = []
        self._ids: list[NDArray[np.uint32]] = []
        self.too_long = 0
        for place, record in source.placed(bad):
            try:
                prompted, ids = _encoded(record, tokenizer, template)
            except (DataError, TokenizerError) as error:
                refused = DataError(f"{place}: {error}")
                refused.__cause__ = error
                bad.add(refused)
                continue
            if max_tokens is not None and len(ids) > max_tokens:
                self.too_long += 1
                continue
            self._records.append(prompted)
            self._ids.append(ids)
        bad.report("the prompts")
        names = dict.fromkeys(name for record in self._records for name in record)
        self._columns = [name for name in names if name != "prompt"]
        self._check(max_tokens)
        self.rows_per_epoch = len(self._records)

    def _check(self, max_tokens: int | None) -> None:
        if not self._records and self.too_long:
            raise DataError(
                f"All {self.too_long:,} prompts are longer than max_tokens={max_tokens}; allow longer ones."
            )
        if not self._records:
            raise DataError("There is no prompt: the source has no record.")
        reserved = sorted(set(self._columns) & set(RESERVED_COLUMNS))
        if reserved:
            raise DataError(f"The records have a field {reserved[0]!r}, a name that rewards know otherwise; rename it.")

    @functools.cached_property
    def description(self) -> dict[str, object]:
        """Everything that decides the prompts, by name; two streams are equal if and only if these are equal."""
        digest = hashlib.sha256()
        for record in self._records:
            digest.update(json.dumps(record["prompt"]).encode())
            if record.get("tools"):
                digest.update(json.dumps(record["tools"]).encode())
        return {"prompts": digest.hexdigest(), "seed": self._seed, "shuffle": self._shuffle}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of `description`."""
        return _digest(self.description)

    def batch(self, indices: Ints) -> PromptBatch:
        """Return the prompts with these places in the endless order.

        Args:
            indices: At least 0.
        """
        return self._batch(self._locate(indices))

    def spare(self, indices: Ints, *moment: int) -> PromptBatch:
        """Return prompts outside the order, to take the place of ones that teach nothing.

        Args:
            indices: Places in a random order of all prompts.
            moment: Numbers that choose this order.
        """
        key = key_of("spare prompts", self._seed, *moment)
        return self._batch(permute(indices % self.rows_per_epoch, self.rows_per_epoch, key))

    @functools.cached_property
    def _stop_ids(self) -> tuple[int, ...]:
        return self._template.stop_ids(self._tokenizer)

    def _locate(self, indices: Ints) -> Ints:
        epochs, places = np.divmod(indices, self.rows_per_epoch)
        if not self._shuffle:
            return np.asarray(places)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            numbers[inside] = permute(places[inside], self.rows_per_epoch, key_of("prompts", self._seed, epoch))
        return numbers

    def _batch(self, numbers: Ints) -> PromptBatch:
        records = [self._records[number] for number in numbers.tolist()]
        prompts = [record["prompt"] for record in records]
        ids = [self._ids[number].astype(np.int64) for number in numbers.tolist()]
        texts = (
            p if isinstance(p, str) else self._tokenizer.decode(i.tolist()) for p, i in zip(prompts, ids, strict=True)
        )
        return {
            "prompt_ids": ids,
            "prompts": prompts,
            "texts": list(texts),
            "columns": {name: [record.get(name) for record in records] for name in self._columns},
            "stop_ids": self._stop_ids,
            "counted": [True] * len(records),
        }


class LeveledPrompts:
    """Prompts of a curriculum: those of its present level, each level in an endless order of its own.

    A rollout's success counts from the next rollout on, so that one that is sampled again after a stop counts once.

    Args:
        curriculum: Rule that moves between the levels.
        streams: Prompts of each level.

    Attributes:
        state: Position in the curriculum, for the prompts that are given now.
        rows_per_epoch: Number of prompts of all levels.
        too_long: Number of dropped prompts of all levels.
    """

    def __init__(self, curriculum: Curriculum, streams: Sequence[PromptStream]) -> None:
        self._curriculum, self._streams = curriculum, streams
        self._newest: tuple[int, int] | None = None
        self.rows_per_epoch = sum(stream.rows_per_epoch for stream in streams)
        self.too_long = sum(stream.too_long for stream in streams)
        self.restart()

    @property
    def description(self) -> dict[str, object]:
        """Everything that decides the prompts but the success rate, by name."""
        return {f"level {level}": stream.description for level, stream in enumerate(self._streams)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of `description`."""
        return _digest(self.description)

    def batch(self, indices: Ints) -> PromptBatch:
        """Return prompts of the present level.

        Args:
            indices: Places in the level's endless order, at least 0.
        """
        return self._streams[self.state.level].batch(indices)

    def spare(self, indices: Ints, *moment: int) -> PromptBatch:
        """Return prompts of the present level outside its order, to take the place of ones that teach nothing.

        Args:
            indices: Places in a random order of the level's prompts.
            moment: Numbers that choose this order.
        """
        return self._streams[self.state.level].spare(indices, *moment)

    def observe(self, right: int, count: int) -> None:
        """Note the success of the newest rollout.

        Args:
            right: Completions that were right, over all ranks.
            count: All completions, over all ranks.
        """
        self._newest = right, count

    def next_state(self) -> LevelState:
        """Return the position for the prompts of the next rollout."""
        return self._curriculum.advance(self.state, *self._newest) if self._newest else self.state

    def restart(self) -> None:
        """Go to the first level."""
        self.resume(LevelState(level=self._curriculum.start))

    def resume(self, state: LevelState) -> None:
        """Go to a position.

        Args:
            state: Position for the prompts of the next rollout.
        """
        self.state = dataclasses.replace(state, level=min(state.level, len(self._streams) - 1))
        self._newest = None


def _digest(description: object) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _encoded(record: Record, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[Record, NDArray[np.uint32]]:
    """Return a record with its prompt, and the prompt's ids."""
    if record.get("prompt") is None:
        record = by_content(record)
    prompt = record.get("prompt")
    if prompt is None:
        raise unknown_form(record, "a prompt with columns for its rewards: it has no 'prompt'", ("prompt",))
    prompt = checked_text(prompt, "prompt") if isinstance(prompt, str) else messages_of(prompt, "prompt")
    ids = template.for_record(record).prompt_ids(prompt, tokenizer)
    return {**record, "prompt": prompt}, np.array(ids, dtype=np.uint32)


def take_prompts(batch: PromptBatch, places: Sequence[int]) -> PromptBatch:
    """Return some prompts of a batch.

    Args:
        batch: Batch to take them from.
        places: Their positions in the batch, in the desired order.
    """
    return {
        "prompt_ids": [batch["prompt_ids"][place] for place in places],
        "prompts": [batch["prompts"][place] for place in places],
        "texts": [batch["texts"][place] for place in places],
        "columns": {name: [column[place] for place in places] for name, column in batch["columns"].items()},
        "stop_ids": batch["stop_ids"],
        "counted": [batch["counted"][place] for place in places],
    }


def join_prompts(first: PromptBatch, second: PromptBatch) -> PromptBatch:
    """Return the prompts of two batches of the same data, one batch after the other.

    Args:
        first: Comes first.
        second: Follows.
    """
    return {
        "prompt_ids": first["prompt_ids"] + second["prompt_ids"],
        "prompts": first["prompts"] + second["prompts"],
        "texts": first["texts"] + second["texts"],
        "columns": {name: column + second["columns"][name] for name, column in first["columns"].items()},
        "stop_ids": first["stop_ids"],
        "counted": first["counted"] + second["counted"],
    }
