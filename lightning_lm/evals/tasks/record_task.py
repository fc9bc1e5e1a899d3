"""Tasks whose items are written from records: files, fields, templates and examples."""

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning_lm.data.records import BadRecords, Place, Placed, read_records
from lightning_lm.errors import DataError
from lightning_lm.evals.requests import Prompt, Shot
from lightning_lm.evals.task import Item, Task
from lightning_lm.evals.tasks.few_shot import FirstShots, Shots
from lightning_lm.evals.tasks.splits import find_split, has_splits, task_folder
from lightning_lm.evals.tasks.template import evaluate_expression, render_record, render_values

__all__ = ["RecordTask"]

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordTask(Task):
    """Base of the tasks whose items are written from the records of files.

    Templates are Jinja (``Question: {{ question }}``), expressions are Jinja without braces (``choices.text``); both
    see the fields of a record.

    Args:
        name: Name in results and logs.
        data: File or folder with the records: JSON lines, JSON, CSV, Parquet, Arrow, or a Hugging Face dataset that was
            saved or downloaded. Of a folder of several tasks, the folder with this task's name is taken.
        split: Split with the items.
        subset: Parts of the paths of the files to take, in the order of preference.
        question: Template of a question, also in examples.
        instructions: Template of the text before the examples; the system message of a chat.
        delimiter: Text between a question and its answer.
        separator: Text between examples.
        shots: Examples before the question.
        id: Expression of the item's name in the results; by default a digest of the record.
        subject: Expression of the part of the task whose score is also shown by itself; empty if there are none.
        cluster: Expression of what items share, such as a passage, for standard errors; empty if nothing.
    """

    data: str = ""
    split: str = "test"
    subset: tuple[str, ...] = ()
    question: str = "{{ question }}"
    instructions: str = ""
    delimiter: str = " "
    separator: str = "\n\n"
    shots: Shots = FirstShots()
    id: str = ""
    subject: str = ""
    cluster: str = ""

    hub: ClassVar[str] = ""
    """Name of the dataset on the Hugging Face Hub."""
    folders: ClassVar[tuple[str, ...]] = ()
    """Further names of the task's folder below a folder of several tasks."""

    @abc.abstractmethod
    def item(self, fields: Fields, prompt: Prompt) -> Item:
        """Return the item of a record; `items` fills in its name, subject, cluster and text.

        Args:
            fields: Fields of the record.
            prompt: The question with its examples.

        Raises:
            DataError: If the record does not fit.
        """

    @abc.abstractmethod
    def shot_answer(self, fields: Fields) -> str:
        """Return the answer of a record that is shown as an example.

        Args:
            fields: Fields of the record.
        """

    def searched_text(self, fields: Fields) -> str:
        """Return the text by which training documents are searched for a record: its values in the question.

        The words of the template are not among them: documents do not have them, and other items do. Tasks with a
        right answer in words put it behind.

        Args:
            fields: Fields of the record.
        """
        return render_values(self.question, fields, "question")

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields that templates see; by default those of the record.

        Args:
            record: A record as it is in its file.
        """
        return record

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the records of a split with their places.

        Args:
            split: Name of the split.

        Raises:
            DataError: If there is none, or a file is damaged.
        """
        for path in self.files(split):
            yield from (Placed(place, record) for place, record in read_records(path, BadRecords()))

    def files(self, split: str, *, text: bool = False) -> list[Path]:
        """Return the files of a split.

        Args:
            split: Name of the split.
            text: Take plain text as well as records.

        Raises:
            DataError: If the task was given no data, or they have no such split.
        """
        if not self.data:
            folder = self.folders[0] if self.folders else self.name
            fetch = f"hf download --repo-type dataset {self.hub} --local-dir DATA/{folder}, then " if self.hub else ""
            raise DataError(f"The task {self.name!r} was given no data. Name its folder: {fetch}--data DATA.")
        root = task_folder(self.data, (self.name, *self.folders))
        if split != self.split and not has_splits(root):
            raise DataError(
                f"{root} has a single split, and {self.shots.num} examples are wanted from the split {split!r}. "
                f"Use shots=0, take them from the items: shots.split={self.split}, or name a folder with both."
            )
        return find_split(root, split, subset=self.subset, text=text)

    def items(self) -> Sequence[Item]:
        """Return the items, in the order of the files."""
        return self._items

    @functools.cached_property
    def _items(self) -> tuple[Item, ...]:
        found: dict[str, Item] = {}
        for place, record in self.records(self.split):
            item = self._placed(place, lambda record=record: self._item(self.prepared(record)))
            name, copy = item.id, 1
            while name in found:
                copy += 1
                name = f"{item.id}-{copy}"
            found[name] = item if copy == 1 else dataclasses.replace(item, id=name)
        if not found:
            raise DataError(f"The task {self.name!r} has no items: the split {self.split!r} of {self.data} is empty.")
        return tuple(found.values())

    def _item(self, fields: Fields) -> Item:
        subject = self._text(self.subject, fields, "subject")
        shots = [] if not self.shots.num else self.shots.choose(self._ordered(subject), fields, subject)
        prompt = Prompt(
            question=self.written_question(fields),
            shots=tuple(Shot(self.written_question(shot), self.delimiter + self.shot_answer(shot)) for shot in shots),
            instructions=render_record(self.instructions, fields, "instructions"),
            separator=self.separator,
        )
        identity = self._text(self.id, fields, "id") if self.id else _digest(fields)
        cluster = _digest(self._text(self.cluster, fields, "cluster")) if self.cluster else None
        text = self.searched_text(fields)
        return dataclasses.replace(self.item(fields, prompt), id=identity, subject=subject, cluster=cluster, text=text)

    def written_question(self, fields: Fields) -> str:
        """Return the question of a record.

        Args:
            fields: Fields of the record.
        """
        return render_record(self.question, fields, "question")

    def _ordered(self, subject: str) -> Sequence[Fields]:
        subject = subject if self.shots.same_subject else ""
        if subject not in self._pools:
            pool = [fields for name, fields in self._shot_records if not self.shots.same_subject or name == subject]
            self._pools[subject] = self.shots.ordered(pool, subject)
        return self._pools[subject]

    @functools.cached_property
    def _pools(self) -> dict[str, Sequence[Fields]]:
        return {}

    @functools.cached_property
    def _shot_records(self) -> list[tuple[str, Fields]]:
        """Subject and fields of each record that may be an example."""
        return [
            self._placed(place, lambda record=record: self._with_subject(self.prepared(record)))
            for place, record in self.records(self.shots.split)
        ]

    def _with_subject(self, fields: Fields) -> tuple[str, Fields]:
        return self._text(self.subject, fields, "subject"), fields

    def _text(self, expression: str, fields: Fields, name: str) -> str:
        return str(evaluate_expression(expression, fields, name)) if expression else ""

    def _placed(self, place: Place, write: Any) -> Any:
        """Return what a record is written as; errors name its place."""
        try:
            return write()
        except DataError as error:
            raise DataError(f"{place} (task {self.name!r}): {error}") from error


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
