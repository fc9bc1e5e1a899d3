"""Records for post-training and where they come from; their forms are those of `lightning_lm.data.forms`."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_lm.data.formats import RECORDS, format_of
from lightning_lm.data.forms import Form, Record, RecordForm, by_content, form_of
from lightning_lm.data.records import BadRecords, OnBadRecord, Place, Placed, read_records
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleSource(Part):
    """Base of the places records come from."""

    def records(self) -> Iterator[Record]:
        """Yield every record, in an order that does not change. Starts anew at each call."""
        raise NotImplementedError

    def placed(self, bad: BadRecords) -> Iterator[Placed]:  # noqa: ARG002
        """Yield every record with its place in the source, for messages.

        Args:
            bad: Takes the records that cannot be read.
        """
        for number, record in enumerate(self.records()):
            yield Placed(Place("", f"Record {number}"), record)

    @property
    def action(self) -> OnBadRecord:
        """What is done with a record that cannot be used."""
        return "raise"

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when a record does. Reads them all, unless the source knows better."""
        digest = hashlib.sha256()
        for record in self.records():
            digest.update(_line_of(record))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples(ExampleSource):
    """Records of files (JSON lines, a JSON array, CSV, Parquet, Arrow, also compressed), or already in Python.

    Args:
        source: A file, a folder of such files, a Hugging Face dataset or another iterable of mappings, or a function
            that returns one.
        format: Form of the records, such as `ShareGPT` or `Columns`; judged by their content by default.
        on_bad_record: ``"raise"`` ends with the first record that cannot be read or used; ``"skip"`` leaves such
            records out and reports their number.
    """

    source: Any
    format: RecordForm | None = None
    on_bad_record: OnBadRecord = "raise"

    def records(self) -> Iterator[Record]:
        """Yield every record.

        Raises:
            DataError: If there is nothing to read, a file is damaged, or an item is no mapping.
        """
        bad = BadRecords(self.on_bad_record)
        for _, record in self.placed(bad):
            yield record
        bad.report(self._name)

    def placed(self, bad: BadRecords) -> Iterator[Placed]:
        """Yield every record with its place."""
        for place, record in self._read(bad):
            if self.format is None:
                yield Placed(place, record)
                continue
            try:
                yield Placed(place, self.format.convert(record))
            except DataError as error:
                bad.add(DataError(f"{place}: {error}"))

    @property
    def action(self) -> OnBadRecord:
        """As ``on_bad_record``."""
        return self.on_bad_record

    @property
    def _name(self) -> str:
        return str(self.source) if isinstance(self.source, str | os.PathLike) else type(self.source).__name__

    def _read(self, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        if isinstance(self.source, str | os.PathLike):
            for path in _paths(Path(self.source)):
                yield from read_records(path, bad)
            return
        items = self.source() if callable(self.source) else self.source
        for number, item in enumerate(items):
            place = Place("", f"Record {number}")
            if isinstance(item, Mapping):
                yield place, dict(item)
            else:
                needed = "a mapping such as {'prompt': ..., 'completion': ...} is needed"
                bad.add(DataError(f"{place} is a {type(item).__name__} ({str(item)[:60]!r}); {needed}."))

    @property
    def fingerprint(self) -> str:
        """Digest of names, sizes and times of change of files, or of the records.

        Raises:
            DataError: If the records can be read only once.
        """
        how = [] if self.format is None else [self.format.to_dict()]
        how += [] if self.on_bad_record == "raise" else [self.on_bad_record]
        digest = self._fingerprint_of_source()
        return hashlib.sha256(f"{digest}:{how}".encode()).hexdigest() if how else digest

    def _fingerprint_of_source(self) -> str:
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
        return (record for _, record in self.placed(BadRecords(self.action)))

    def placed(self, bad: BadRecords) -> Iterator[Placed]:
        """Yield every record, with its prompt and its place."""
        for place, record in as_examples(self.source).placed(bad):
            try:
                yield Placed(place, {**record, "prompt": self.prompt.format_map(record)})
            except KeyError as error:
                bad.add(
                    DataError(
                        f"{place}: The prompt {self.prompt!r} needs the field {error}, and the record has "
                        f"{sorted(record)}. Name one of these in braces; braces that are meant as such are written "
                        "twice."
                    )
                )

    @property
    def action(self) -> OnBadRecord:
        """As of the source."""
        return as_examples(self.source).action


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
        return (record for _, record in self.placed(BadRecords(self.action)))

    def placed(self, bad: BadRecords) -> Iterator[Placed]:
        """Yield the records of this side, with their places in the whole source."""
        wanted, limit = self.side == "validation", self._limit
        for place, record in self.source.placed(bad):
            if (_draw(record) < limit) is wanted:
                yield Placed(place, record)

    @property
    def action(self) -> OnBadRecord:
        """As of the source."""
        return self.source.action

    @functools.cached_property
    def _limit(self) -> int:
        """Border of the draws of both sides: that of the fraction, moved if it would leave one side without a record.

        Reads only until a record of each side was met.
        """
        limit, lowest, highest = round(self.fraction * 2**32), 2**32, -1
        for _, record in self.source.placed(BadRecords("skip")):
            draw = _draw(record)
            lowest, highest = min(lowest, draw), max(highest, draw)
            if lowest < limit <= highest:
                return limit
        if lowest >= highest:
            raise DataError(
                f"A fraction of {self.fraction} for validation leaves no record for {self.side}: two different records "
                "are needed at least. Hold none out (--data.validation 0), or name a source for validation."
            )
        return lowest + 1 if lowest >= limit else highest

    @property
    def fingerprint(self) -> str:
        """Digest of the source's fingerprint and of the split."""
        return hashlib.sha256(f"{self.source.fingerprint}:{self.side}:{self.fraction!r}".encode()).hexdigest()


def _draw(record: Record) -> int:
    """Return the number in [0, 2^32) that decides on which side of a split a record lies."""
    return int.from_bytes(hashlib.sha256(_line_of(record)).digest()[:4], "big")


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
    files = sorted(path for path in root.glob("**/*") if path.is_file() and not path.name.startswith("."))
    found = [path for path in files if format_of(path).name in RECORDS]
    if not found:
        message = f"{str(root)!r} is no file of records (JSON lines, JSON, CSV, Parquet, Arrow), nor a folder of such"
        hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(root)) and not root.exists()
        remedy = f" A dataset of the Hugging Face Hub is fetched first: {_fetch(str(root))}." if hub else ""
        raise DataError(f"{message} (looked from {Path.cwd()}).{remedy}")
    return found


def _fetch(name: str) -> str:
    folder = name.rsplit("/", 1)[1]
    return f"hf download --repo-type dataset {name} --local-dir {folder}, then --data.train {folder}"


def texts_of(records: ExampleSource | Iterable[Record]) -> Iterator[str]:
    """Yield the texts of records, piece by piece: prompts, completions, and the content of messages.

    Args:
        records: Of any form, or their source.
    """
    if isinstance(records, ExampleSource):
        records = (record for _, record in records.placed(BadRecords("skip")))
    for record in records:
        try:
            converted = by_content(record)
        except DataError:  # whoever encodes the records reports it with its place
            continue
        for field in ("text", "prompt", "completion", "messages", "chosen", "rejected"):
            said = converted.get(field)
            if isinstance(said, str):
                yield said
            elif said is not None:
                yield from (message["content"] for message in said if isinstance(message.get("content"), str))


def split_preference(record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return prompt, preferred and other completion of a preference, finding the prompt if it is not given.

    An implicit prompt is the longest beginning that both completions share, as in TRL: of texts, a blank at its end
    goes to the completions; of conversations, it ends before an assistant's turn. A text as prompt of conversations
    that repeat it (UltraFeedback) is replaced by their shared turns.

    Args:
        record: Has ``chosen`` and ``rejected``, and may have ``prompt``.

    Raises:
        DataError: If the completions are the same, differ in kind, or share no prompt.
    """
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if isinstance(chosen, str) is not isinstance(rejected, str):
        kinds = [type(side).__name__ for side in (chosen, rejected)]
        raise DataError(f"chosen is a {kinds[0]} and rejected a {kinds[1]}; use one kind.")
    if chosen == rejected:
        raise DataError(f"chosen and rejected are the same ({str(chosen)[:80]!r}); such a pair teaches nothing.")
    if isinstance(chosen, str):
        shared = 0 if prompt is not None else _shared_text(chosen, rejected)
        return chosen[:shared] if prompt is None else prompt, chosen[shared:], rejected[shared:]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn.get("role") == "assistant" for turn in side):
            raise DataError(f"{name} has no turn of 'assistant', but {[turn.get('role') for turn in side]}.")
    if prompt is not None and all(side[0].get("role") == "assistant" for side in (chosen, rejected)):
        return prompt, chosen, rejected
    shared = _shared_turns(chosen, rejected)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared_text(chosen: str, rejected: str) -> int:
    shorter = min(len(chosen), len(rejected))
    shared = next((place for place in range(shorter) if chosen[place] != rejected[place]), shorter)
    is_inside = shared < shorter
    return shared - 1 if is_inside and chosen[:shared].endswith(" ") else shared


def _shared_turns(chosen: list[Record], rejected: list[Record]) -> int:
    """Return how many turns are the prompt: those that both share, up to an assistant's turn that is left to both."""
    shared, shorter = 0, min(len(chosen), len(rejected))
    while shared < shorter and chosen[shared] == rejected[shared]:
        shared += 1
    for end in range(min(shared, shorter - 1), -1, -1):
        if chosen[end].get("role") == rejected[end].get("role") == "assistant":
            return end
    roles = [[turn.get("role") for turn in side] for side in (chosen, rejected)]
    raise DataError(
        f"chosen ({roles[0]}) and rejected ({roles[1]}) share {shared} turn(s), which leaves no prompt before a turn "
        "of 'assistant' in each. Give the prompt in a field of its own, or let both begin with the same turns."
    )
