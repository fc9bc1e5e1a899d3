"""Demonstrations as a token store with a mask of the tokens to train on."""

import dataclasses
import functools
import hashlib
import json
import mmap
import shutil
import warnings
from array import array
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.packing import OnePerRow, Packing, WholeFit
from lightning_lm.data.parallel import map_chunks
from lightning_lm.data.post_training.chat import ChatTemplate, Message, Plain, Rendered, begin_ids
from lightning_lm.data.post_training.examples import ExampleSource
from lightning_lm.data.post_training.forms import Record, by_content, label_of, refuse_mixed, unknown_form
from lightning_lm.data.post_training.messages import checked_text
from lightning_lm.data.post_training.pretokenized import encode_tokens
from lightning_lm.data.post_training.written_special import writes_special, written_special_report
from lightning_lm.data.records import BadRecords, Placed
from lightning_lm.data.store import TokenStore, token_dtype, write_shards
from lightning_lm.deprecation import takes_renamed_arguments
from lightning_lm.errors import ConfigurationError, DataError, TokenizerError
from lightning_lm.parts import Part
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import locked, naming, rename, synced
from lightning_lm.tokenizers.word_counts import num_cores

__all__ = ["ExampleCounts", "LearnOn", "SupervisedRows", "SupervisedStore", "encode_example", "store_examples"]

LearnOn = Literal["completion", "assistant", "all"]
"""Target tokens of an example: its completion (the last one of a conversation), all completions, or everything."""

_LEARNED_FILE = "learned.bin"
_VERSION = 5
"""Version of the encoding, incremented when the same records give other ids or masks: older caches are not used."""
_MASK_VERSION = 4
"""Version in the fingerprint of a run's rows, incremented when the same ids get other masks.

The ids are in the fingerprint anyway, so a run of an earlier release goes on where its rows are still the same.
"""


@takes_renamed_arguments
@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedRows(Part):
    """Encoding of examples as rows of tokens.

    Args:
        context_length: Positions the model sees. Rows are one token longer.
        train_on: The ``answer`` (the last completion of a conversation), every turn of the ``assistant``, or
            ``all`` tokens.
        too_long: Policy for an example longer than a row: cut at its end, or dropped. One that was cut gets no
            end-of-text token, so that it does not teach to stop in the middle.
        packing: Layout of examples in rows; none is ever divided.

    Raises:
        ConfigurationError: If rows are too short, or the packing splits examples.
    """

    context_length: int = 1024
    train_on: LearnOn = "completion"
    too_long: Literal["truncate", "drop"] = "truncate"
    packing: Packing = WholeFit()

    def __post_init__(self) -> None:
        if self.context_length < 1:
            raise ConfigurationError(f"context_length={self.context_length} is too small; use at least 1.")
        if not isinstance(self.packing, WholeFit | OnePerRow):
            raise ConfigurationError(
                f"{type(self.packing).__name__} splits examples, so a completion would lose its prompt. "
                "Use WholeFit() or OnePerRow()."
            )


@dataclasses.dataclass
class ExampleCounts:
    """Counts of used, cut and dropped records.

    Args:
        kept: Examples to train on.
        cut: Examples that were kept, but cut.
        too_long: Examples dropped because of their length.
        empty: Examples left out because they have no target tokens.
        num_learned: Number of target tokens.
        bad: Records dropped because they cannot be used.
        written_special: Examples in which a special token stands as text, and is encoded as its characters.
    """

    kept: int = 0
    cut: int = 0
    too_long: int = 0
    empty: int = 0
    num_learned: int = 0
    bad: int = 0
    written_special: int = 0

    def report(self, row_length: int) -> str | None:
        """Return a description of the dropped and cut examples; empty if there are none.

        Args:
            row_length: Most tokens of an example.
        """
        losses = [
            (self.cut, f"{self.cut:,} were cut to {row_length:,} tokens"),
            (self.too_long, f"{self.too_long:,} were dropped because they do not fit into {row_length:,} tokens"),
            (self.empty, f"{self.empty:,} were dropped because they have no completion"),
            (self.bad, f"{self.bad:,} were dropped because they cannot be used"),
        ]
        said = [words for count, words in losses if count]
        total = self.kept + self.too_long + self.empty + self.bad
        parts = [f"Of {total:,} examples {', '.join(said)}."] if said else []
        if self.written_special:
            parts.append(written_special_report(self.written_special))
        return " ".join(parts) or None


class SupervisedStore(TokenStore):
    """A token store whose documents are examples.

    Args:
        path: The folder that `store_examples` wrote.

    Raises:
        DataError: If the folder is no such store, or one that was cut short.
    """

    files = (*TokenStore.files, _LEARNED_FILE)

    def __reduce__(self) -> tuple[type["SupervisedStore"], tuple[str]]:
        return SupervisedStore, (str(self.path),)

    @property
    def counts(self) -> ExampleCounts:
        """Counts of used, cut and dropped records."""
        return ExampleCounts(**self.meta["counts"])

    @property
    def fingerprint(self) -> str:
        """Hex digest of the tokens and of the settings of their mask."""
        return hashlib.sha256(f"{super().fingerprint}:{self.meta['source']}".encode()).hexdigest()

    def verify(self) -> None:
        """Compare the tokens and their mask with their digests.

        Raises:
            DataError: If a byte of the store has changed since it was written.
        """
        super().verify()
        learned = (self.path / _LEARNED_FILE).read_bytes()
        if self.meta.get("learned") not in (None, hashlib.sha256(learned).hexdigest()):
            raise DataError(
                f"The examples in {self.path} are damaged: {_LEARNED_FILE} has changed since it was written. Delete "
                "the folder."
            )

    def _map_learned(self) -> NDArray[np.bool_]:
        path = self.path / _LEARNED_FILE
        found = path.stat().st_size if path.is_file() else 0
        if found != self.num_tokens:
            raise DataError(
                f"The examples in {self.path} are damaged: {path.name} has {found} bytes. Delete the folder."
            )
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.bool_)


def encode_example(record: Record, tokenizer: Tokenizer, template: ChatTemplate, train_on: LearnOn) -> Rendered:
    """Return the ids of an example, up to the last target.

    Args:
        record: A conversation, a prompt with its completion, a text or tokens; see `data.post_training.forms`.
        tokenizer: Tokenizer of the model.
        template: Chat template, renders conversations as text.
        train_on: Target tokens of an example.

    Raises:
        DataError: If the record has none of these forms or several, is a KTO record, or cannot be written.
    """
    refuse_mixed(record)
    record = by_content(record)
    template = template.for_record(record)
    if record.get("input_ids") is not None:
        return encode_tokens(record, tokenizer)
    if label_of(record) is not None and record.get("completion") is not None:
        raise DataError(
            "It has a completion with a label, as KTO needs it; trained on here, bad completions would be imitated. "
            "Use KTO (recipe kto/reverse), or name the columns to train on all completions: --data.train Examples "
            "--data.train.source PATH --data.train.format Columns --data.train.format.prompt prompt "
            "--data.train.format.completion completion"
        )
    if record.get("messages") is not None:
        return _encode_messages(record["messages"], tokenizer, template, train_on)
    if record.get("prompt") is not None and record.get("completion") is not None:
        return _encode_completion(record["prompt"], record["completion"], tokenizer, template, train_on)
    if isinstance(record.get("text"), str):
        return _encode_text(checked_text(record["text"], "text"), tokenizer, template)
    raise unknown_form(record, "an example to train on", ("prompt_completion", "messages", "text", "tokens"))


def _encode_completion(
    prompt: Any, completion: Any, tokenizer: Tokenizer, template: ChatTemplate, train_on: LearnOn
) -> Rendered:
    if train_on == "assistant" and not isinstance(prompt, str):
        turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return _encode_messages([*prompt, *turns], tokenizer, template, train_on)
    prompt_ids, answer = template.pair(prompt, completion, tokenizer)
    prompt_mask = [train_on == "all"] * len(prompt_ids)
    answer_mask = [True] * len(answer.ids) if train_on == "all" else answer.learn_mask
    return Rendered([*prompt_ids, *answer.ids], [*prompt_mask, *answer_mask])


def _encode_text(text: str, tokenizer: Tokenizer, template: ChatTemplate) -> Rendered:
    """Return a text with begin and end, every token learned. One that a chat template has written has its tokens."""
    reads_special = not isinstance(template, Plain) or template.read_special
    begin, ids = begin_ids(tokenizer), tokenizer.encode(text, allow_special=reads_special)
    ids = ids if ids[: len(begin)] == begin else [*begin, *ids]
    if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
        ids = [*ids, tokenizer.eos_id]
    return Rendered(ids, [True] * len(ids))


def _encode_messages(
    messages: list[Message], tokenizer: Tokenizer, template: ChatTemplate, train_on: LearnOn
) -> Rendered:
    if train_on == "all":
        masked = next((place for place, message in enumerate(messages) if message.get("weight") == 0), None)
        if masked is not None and messages[masked].get("role") == "assistant":
            raise DataError(
                f"messages[{masked}] is masked (weight 0), and train_on='all' trains on every token. Use "
                "--data.rows.train_on assistant, or take the masks out."
            )
        ids = template.render(messages, tokenizer, learn_from=len(messages)).ids
        return Rendered(ids, [True] * len(ids))
    answers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        _refuse_strange_roles(messages)
        return Rendered([], [])
    first = answers[-1] if train_on == "completion" else 0
    ids, mask = template.render(messages[: answers[-1] + 1], tokenizer, learn_from=first)
    end = len(mask) - mask[::-1].index(True) if True in mask else 0
    return Rendered(ids[:end], mask[:end])


def _refuse_strange_roles(messages: list[Message]) -> None:
    roles = {str(message.get("role")) for message in messages}
    if strange := sorted(roles - {"user", "system", "tool", "developer"}):
        raise DataError(
            f"No message has the role 'assistant', and {', '.join(map(repr, strange))} is no known role; write "
            "'assistant' for those to train on."
        )


def store_examples(
    source: ExampleSource,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rows: SupervisedRows,
    cache: Path,
    *,
    num_workers: int | None = None,
) -> SupervisedStore:
    """Encode the records of a source, or open the result of an earlier call in the cache.

    Args:
        source: Records with ``prompt`` and ``completion``, or ``messages``.
        tokenizer: Tokenizer of the model.
        template: Chat template, renders conversations as text.
        rows: Longest example, and its target tokens.
        cache: Folder with a sub-folder for each combination of these.
        num_workers: Processes that encode; by default one per core. A few examples are never worth a process.

    Raises:
        DataError: If a record cannot be used, or none is left; names it.
    """
    limits = [rows.context_length, rows.train_on, rows.too_long]
    written_by = [template.to_dict(), getattr(tokenizer, "chat_template", None)]
    how = [source.fingerprint, tokenizer.fingerprint, written_by, limits]
    folder = cache / _digest([_VERSION, *how])[:32]
    with locked(cache):
        if folder.is_dir():
            try:
                return SupervisedStore(folder)
            except DataError as error:
                warnings.warn(f"{error} They are encoded again.", stacklevel=2)
                shutil.rmtree(folder)
        bad = source.policy()
        encode = functools.partial(_encode, tokenizer, template, rows, source.policy())
        encoded = _Encoded()
        for part in map_chunks(encode, source.placed(bad), num_workers=num_workers or num_cores()):
            for message in part.bad:
                bad.add(DataError(message))
            encoded.extend(part)
        encoded.counts.bad = bad.count
        bad.report("the examples")
        unfinished = cache / f"{folder.name}.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        _write(encoded, unfinished, _digest([_MASK_VERSION, *how]), tokenizer, rows)
        rename(unfinished, folder)
    return SupervisedStore(folder)


class _Encoded:
    """Examples in memory, five bytes a token."""

    def __init__(self) -> None:
        self.tokens, self.learned, self.lengths = array("I"), bytearray(), array("q")
        self.counts = ExampleCounts()
        self.bad: list[str] = []

    def add(self, rendered: Rendered, rows: SupervisedRows) -> None:
        """Add an example, unless it has no target tokens."""
        ids, mask = rendered
        row_length, counts = rows.context_length + 1, self.counts
        is_cut = len(ids) > row_length
        if not any(mask[1:]):
            counts.empty += 1
        elif is_cut and (rows.too_long == "drop" or not any(mask[1:row_length])):
            counts.too_long += 1
        else:
            counts.kept += 1
            counts.cut += is_cut
            counts.num_learned += sum(mask[1:row_length])
            self.tokens.extend(ids[:row_length])
            self.learned.extend(mask[:row_length])
            self.lengths.append(min(len(ids), row_length))

    def extend(self, other: "_Encoded") -> None:
        """Take in all examples of another."""
        self.tokens.extend(other.tokens)
        self.learned.extend(other.learned)
        self.lengths.extend(other.lengths)
        pairs = zip(dataclasses.astuple(self.counts), dataclasses.astuple(other.counts), strict=True)
        self.counts = ExampleCounts(*map(sum, pairs))


def _encode(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rows: SupervisedRows,
    bad: BadRecords,
    first: int,  # noqa: ARG001
    records: list[Placed],
) -> _Encoded:
    encoded = _Encoded()
    for place, record in records:
        try:
            rendered = encode_example(record, tokenizer, template, rows.train_on)
        except (DataError, TokenizerError) as error:
            refused = DataError(f"{place}: {error}")
            refused.__cause__ = error
            bad.add(refused)
            encoded.bad.append(str(refused))  # counted where all chunks come together
            continue
        encoded.add(rendered, rows)
        encoded.counts.written_special += writes_special(record, tokenizer, template)
    return encoded


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _write(encoded: _Encoded, folder: Path, source: str, tokenizer: Tokenizer, rows: SupervisedRows) -> None:
    """Write a store that has all but its name."""
    if not encoded.counts.kept:
        report = encoded.counts.report(rows.context_length + 1)
        raise DataError(f"There is no example to train on. {report or 'No record came.'}")
    dtype = token_dtype(tokenizer.vocab_size)
    meta = {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": None,  # the begin and end tokens are in the examples
        "tokenizer": tokenizer.fingerprint,
        "source": source,
        "num_bytes": 0,
        "counts": dataclasses.asdict(encoded.counts),
        "learned": hashlib.sha256(encoded.learned).hexdigest(),
    }
    tokens = np.frombuffer(encoded.tokens, dtype=np.uint32).astype(dtype)
    write_shards(folder, [(tokens, np.frombuffer(encoded.lengths, dtype=np.int64))], meta)
    with naming(folder), synced(folder / _LEARNED_FILE) as file:
        file.write(encoded.learned)
