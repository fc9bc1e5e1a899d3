"""Records for post-training and where they come from; their forms are those of `data.post_training.forms`."""

import dataclasses
import functools
import hashlib
import json
import os
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_lm.data.formats import RECORDS, format_of
from lightning_lm.data.paths import find_files, looks_like_path, roots_of
from lightning_lm.data.post_training.forms import Form, Record, RecordForm, by_content, form_of
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
    "split_sides",
    "texts_of",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleSource(Part):
    """Base of the places records come from."""

    def records(self) -> Iterator[Record]:
        """Yield every record, in an order that does not change. Starts again at each call."""
        raise NotImplementedError

    def placed(self, bad: BadRecords) -> Iterator[Placed]:  # noqa: ARG002
        """Yield every record with its place in the source, for messages.

        Args:
            bad: Takes the records that cannot be read.
        """
        for number, record in enumerate(self.records()):
            yield Placed(Place("", f"Record {number}"), record)

    def split(self, side: Literal["train", "validation"], fraction: float) -> "ExampleSource":
        """Return one side of the records, split by their content.

        Args:
            side: ``"train"`` or ``"validation"``.
            fraction: Fraction of the records for validation.
        """
        return HeldOutExamples(source=self, side=side, fraction=fraction)

    @property
    def action(self) -> OnBadRecord:
        """Action for a record that cannot be used."""
        return "raise"

    @property
    def remedy(self) -> str:
        """Sentence on how records that cannot be used are skipped."""
        return ""

    def policy(self) -> BadRecords:
        """Return the policy for records that cannot be used."""
        return BadRecords(self.action, self.remedy)

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when a record does. Reads them all, unless the source has a cheaper way."""
        digest = hashlib.sha256()
        for record in self.records():
            digest.update(_line_of(record))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples(ExampleSource):
    """Records of files (JSON lines, a JSON array, CSV, Parquet, Arrow, also compressed), or already in Python.

    Args:
        source: A file, a folder of such files, a pattern, a list of these, a Hugging Face dataset or another iterable
            of mappings, or a function that returns one.
        format: Form of the records, such as `ShareGPT` or `Columns`; judged by their content by default.
        on_bad_record: ``"raise"`` ends with the first record that cannot be read or used; ``"skip"`` leaves such
            records out and reports their number.
    """

    source: Any = dataclasses.field(kw_only=False)
    format: RecordForm | None = None
    on_bad_record: OnBadRecord = "raise"

    def records(self) -> Iterator[Record]:
        """Yield every record.

        Raises:
            DataError: If there is nothing to read, a file is damaged, or an item is no mapping.
        """
        bad = self.policy()
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
    def remedy(self) -> str:
        """Options for the command line if it names files, else arguments."""
        if not _names_files(self.source):
            return "To skip and count such records: Examples(..., on_bad_record='skip')."
        skips = f"--data.train Examples --data.train.source {self._name} --data.train.on_bad_record skip"
        return f"To skip and count such records: {skips}"

    @property
    def _name(self) -> str:
        return str(self.source) if _names_files(self.source) else type(self.source).__name__

    def _read(self, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        if _names_files(self.source):
            yield from self._read_files(bad)
            return
        items = self.source() if callable(self.source) else self.source
        for number, item in enumerate(items):
            place = Place("", f"Record {number}")
            if isinstance(item, Mapping):
                yield place, dict(item)
            else:
                needed = "a mapping such as {'prompt': ..., 'completion': ...} is needed"
                bad.add(DataError(f"{place} is a {type(item).__name__} ({str(item)[:60]!r}); {needed}."))

    def _read_files(self, bad: BadRecords) -> Iterator[tuple[Place, Record]]:
        number = bad.count
        for path in _paths(self.source):
            for record in read_records(path, bad):
                number += 1
                yield record
        if not number:
            raise DataError(f"{self._name} has no records: the file is empty, or all files of the folder are.")

    @property
    def fingerprint(self) -> str:
        """Digest of names, sizes and times of change of files, or of the records.

        Raises:
            DataError: If the records can be read only once.
        """
        digest = self._fingerprint_of_source()
        if self.format is None and self.on_bad_record == "raise":
            return digest
        how = None if self.format is None else self.format.to_dict()
        return hashlib.sha256(f"{digest}:{how}:{self.on_bad_record}".encode()).hexdigest()

    def _fingerprint_of_source(self) -> str:
        if _names_files(self.source):
            paths = _paths(self.source)
            return digest_of_files(paths, Path(os.path.commonpath(paths)))
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
        prompt: Prompt, with the names of fields in braces.
    """

    source: ExampleSource | str = dataclasses.field(kw_only=False)
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
        return (record for _, record in self.placed(self.policy()))

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

    @property
    def remedy(self) -> str:
        """As of the source."""
        return as_examples(self.source).remedy


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutExamples(ExampleSource):
    """One side of a source that is split by the content of its records: copies of a record stay on one side.

    Args:
        source: Source to split.
        side: ``"train"`` or ``"validation"``.
        fraction: Fraction of the records for validation, between 0 and 1.

    Raises:
        ConfigurationError: If the fraction is not between 0 and 1.
    """

    source: ExampleSource
    side: Literal["train", "validation"]
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigurationError(f"A fraction of {self.fraction} cannot be held out; use one between 0 and 1.")

    def records(self) -> Iterator[Record]:
        """Yield the records of this side.

        Raises:
            DataError: If there are none.
        """
        return (record for _, record in self.placed(self.policy()))

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

    @property
    def remedy(self) -> str:
        """As of the source."""
        return self.source.remedy

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
        train: Anything that `as_examples` accepts.
        validation: The same, or the fraction of ``train`` to hold out; None or 0 for none.
    """
    source = as_examples(train)
    if not isinstance(validation, int | float):
        return source, None if validation is None else as_examples(validation)
    if not validation:
        return source, None
    return source.split("train", validation), source.split("validation", validation)


def _names_files(source: Any) -> bool:
    names = source if isinstance(source, list | tuple) and source else [source]
    return all(isinstance(name, str | os.PathLike) for name in names) and (
        not isinstance(source, list | tuple) or all(looks_like_path(str(name)) for name in names)
    )


def _paths(source: Any) -> list[Path]:
    names = [str(name) for name in (source if isinstance(source, list | tuple) else [source])]
    files = [(root, path) for root in roots_of(names) for path in find_files(root)]
    found = [path for root, path in files if path == root or format_of(path).name in RECORDS]
    if not found:
        raise DataError(f"{', '.join(names)} has no file of records (JSON lines, JSON, CSV, Parquet, Arrow).")
    return found


def texts_of(records: ExampleSource | Iterable[Record]) -> Iterator[str]:
    """Yield the texts of records, piece by piece: prompts, completions, and the content of messages.

    Args:
        records: Records of any form, or their source.
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
