"""Records to post-train on: where they come from, and which form they have.

Four forms are known, by their fields::

    {"prompt", "completion"}            an answer to learn                        prompt_completion
    {"messages": [{"role", "content"}]} a conversation to learn                   messages
    {"prompt"?, "chosen", "rejected"}   two answers, the first preferred          preference
    {"prompt", ...}                     a question, with columns for its rewards  prompt

A prompt or an answer is a text, or a list of messages. Where a preference has no prompt, it is what both answers
begin with.
"""

import dataclasses
import hashlib
import json
import os
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_lm.data.records import read_records
from lightning_lm.data.sources import digest_of_files
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Part

__all__ = [
    "ExampleSource",
    "Examples",
    "Form",
    "HeldOutExamples",
    "PromptedExamples",
    "Record",
    "as_examples",
    "form_of",
    "split_preference",
    "split_sides",
    "texts_of",
]

Record = dict[str, Any]
Form = Literal["prompt_completion", "messages", "preference", "prompt"]
_FIELDS: dict[Form, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt": ("prompt",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleSource(Part):
    """Base of the places records come from."""

    def records(self) -> Iterator[Record]:
        """Yield every record, in an order that does not change. Starts anew at each call."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when a record does. Reads them all, unless the source knows better."""
        digest = hashlib.sha256()
        for record in self.records():
            digest.update(_line_of(record))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples(ExampleSource):
    """Records of ``.jsonl`` or ``.parquet`` files (``.gz`` and ``.zst`` are unpacked), or already in Python.

    Args:
        source: A file, a folder of such files, a Hugging Face dataset or another iterable of mappings, or a function
            that returns one.
    """

    source: Any

    def records(self) -> Iterator[Record]:
        """Yield every record.

        Raises:
            DataError: If there is nothing to read, a file is damaged, or an item is no mapping.
        """
        if isinstance(self.source, str | os.PathLike):
            for path in _paths(Path(self.source)):
                for _, record in read_records(path):
                    yield record
            return
        items = self.source() if callable(self.source) else self.source
        for number, item in enumerate(items):
            if not isinstance(item, Mapping):
                raise DataError(
                    f"Item {number} is a {type(item).__name__}; a mapping such as {{'prompt': ...}} is needed."
                )
            yield dict(item)

    @property
    def fingerprint(self) -> str:
        """Digest of names, sizes and times of change of files, or of the records.

        Raises:
            DataError: If the records can be read only once.
        """
        if isinstance(self.source, str | os.PathLike):
            return digest_of_files(_paths(Path(self.source)), Path(self.source))
        if isinstance(self.source, Iterator):
            raise DataError(
                "The records can be read only once, but they are needed again. Pass a list, a path, or the function "
                "that makes the generator, instead of the generator."
            )
        return super().fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedExamples(ExampleSource):
    """Records that get a prompt written from their other fields, such as a question with an instruction.

    Args:
        source: Another source, or a file or folder.
        prompt: What is asked, with the names of fields in braces.
    """

    source: ExampleSource | str
    prompt: str = "{question}"

    def __post_init__(self) -> None:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(self.prompt) if field is not None]
        except ValueError as error:
            raise ConfigurationError(f"The prompt {self.prompt!r} has a brace without its other: {error}.") from error
        if not all(field.isidentifier() for field in fields):
            raise ConfigurationError(
                f"The prompt {self.prompt!r} has {fields} in braces; only names of fields may stand there. Braces that "
                "are meant as such are written twice."
            )

    def records(self) -> Iterator[Record]:
        """Yield every record, with its prompt.

        Raises:
            DataError: If a record lacks a field that the prompt names.
        """
        for record in as_examples(self.source).records():
            try:
                yield {**record, "prompt": self.prompt.format_map(record)}
            except KeyError as error:
                raise DataError(
                    f"The prompt {self.prompt!r} needs the field {error}, and a record has {sorted(record)}. Name one "
                    "of these in braces; braces that are meant as such are written twice."
                ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutExamples(ExampleSource):
    """One side of a source that is split by what its records say: copies of a record stay on one side.

    Args:
        source: What is split.
        side: ``"train"`` or ``"validation"``.
        fraction: Share of the records for validation, between 0 and 1.

    Raises:
        ConfigurationError: If the share is not between 0 and 1.
    """

    source: ExampleSource
    side: Literal["train", "validation"]
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigurationError(f"A share of {self.fraction} cannot be held out; use one between 0 and 1.")

    def records(self) -> Iterator[Record]:
        """Yield the records of this side.

        Raises:
            DataError: If there are none.
        """
        limit, wanted, given = round(self.fraction * 2**32), self.side == "validation", False
        for record in self.source.records():
            number = int.from_bytes(hashlib.sha256(_line_of(record)).digest()[:4], "big")
            if (number < limit) is wanted:
                given = True
                yield record
        if not given:
            raise DataError(
                f"A share of {self.fraction} for validation leaves no record for {self.side}: there are too few. Hold "
                "out another share, or none (0)."
            )

    @property
    def fingerprint(self) -> str:
        """Digest of the source's fingerprint and of the split."""
        return hashlib.sha256(f"{self.source.fingerprint}:{self.side}:{self.fraction!r}".encode()).hexdigest()


def _line_of(record: Record) -> bytes:
    return json.dumps(record, sort_keys=True, default=str).encode() + b"\n"


def as_examples(value: ExampleSource | str | Path | Iterable[Any] | Callable[[], Iterable[Any]]) -> ExampleSource:
    """Return the source of records that a value stands for.

    Args:
        value: A path, an iterable of mappings, a function that makes one, or already a source.
    """
    return value if isinstance(value, ExampleSource) else Examples(source=value)


def split_sides(train: Any, validation: Any) -> tuple[ExampleSource, ExampleSource | None]:
    """Return the records to train on, and those for validation if there are any.

    Args:
        train: What `as_examples` takes.
        validation: The same, or the share of ``train`` to hold out; None or 0 for none.
    """
    source = as_examples(train)
    if not isinstance(validation, int | float):
        return source, None if validation is None else as_examples(validation)
    if not validation:
        return source, None
    train_side = HeldOutExamples(source=source, side="train", fraction=validation)
    return train_side, HeldOutExamples(source=source, side="validation", fraction=validation)


def _paths(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    endings = (".jsonl", ".ndjson", ".parquet")
    names = {path: path.name.removesuffix(".gz").removesuffix(".zst") for path in root.glob("**/*") if path.is_file()}
    found = sorted(path for path, name in names.items() if name.endswith(endings))
    if not found:
        raise DataError(
            f"{str(root)!r} is no .jsonl or .parquet file, nor a folder of such (looked from {Path.cwd()})."
        )
    return found


def form_of(record: Mapping[str, Any]) -> Form:
    """Return the form of a record, judged by its fields.

    Args:
        record: A field that holds nothing (``None``) is not there.

    Raises:
        DataError: If it has none of the forms; names the fields that it has.
    """
    for form, fields in _FIELDS.items():
        if all(record.get(field) is not None for field in fields):
            return form
    forms = "; ".join(f"{form}: {', '.join(fields)}" for form, fields in _FIELDS.items())
    raise DataError(f"A record has the fields {sorted(record)}, which is none of the known forms ({forms}).")


def texts_of(records: Iterable[Record]) -> Iterator[str]:
    """Yield what is said in records, piece by piece: prompts, answers, and the content of messages.

    Args:
        records: Of any form.
    """
    for record in records:
        for field in dict.fromkeys(name for names in _FIELDS.values() for name in names):
            said = record.get(field)
            if isinstance(said, str):
                yield said
            elif said is not None:
                yield from (message["content"] for message in said if isinstance(message.get("content"), str))


def split_preference(record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return prompt, preferred and other answer of a preference, finding the prompt where it is not given.

    An implicit prompt is the longest beginning that both answers share: whole messages of a conversation, or text cut
    back to the last blank, so that no word is divided between prompt and answer.

    Args:
        record: Has ``chosen`` and ``rejected``, and may have ``prompt``.

    Raises:
        DataError: If the answers are the same, or differ in kind.
    """
    chosen, rejected = record["chosen"], record["rejected"]
    if type(chosen) is not type(rejected):
        raise DataError(f"chosen is a {type(chosen).__name__} and rejected a {type(rejected).__name__}; use one kind.")
    if chosen == rejected:
        raise DataError(f"chosen and rejected are the same ({str(chosen)[:80]!r}); such a pair teaches nothing.")
    if record.get("prompt") is not None:
        return record["prompt"], chosen, rejected
    shared = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        shared += 1
    if isinstance(chosen, str):
        shared = chosen.rfind(" ", 0, shared) + 1 if shared else 0
    return chosen[:shared], chosen[shared:], rejected[shared:]
