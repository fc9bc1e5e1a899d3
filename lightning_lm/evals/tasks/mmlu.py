"""MMLU (Hendrycks et al. 2021, arXiv:2009.03300) and MMLU-Pro (Wang et al. 2024, arXiv:2406.01574)."""

import csv
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning_lm.data.records import BadRecords, Place, Placed, read_records
from lightning_lm.errors import DataError
from lightning_lm.evals.tasks.choice import ChoiceTask
from lightning_lm.evals.tasks.few_shot import FirstShots, Shots
from lightning_lm.evals.tasks.generation_task import GenerationTask
from lightning_lm.evals.tasks.verdicts import AnswerCheck, Check, SameText
from lightning_lm.rewards import AnswerPattern

__all__ = ["MMLU", "MMLUPro"]

_LETTERS = "ABCD"
_COLUMNS = ("question", *_LETTERS, "answer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMLU(ChoiceTask):
    """Questions about 57 subjects with four choices; the letter is scored.

    Reads the authors' CSV files without header (``test/anatomy_test.csv``) and the tables of the Hub.
    """

    name: str = "mmlu"
    subset: tuple[str, ...] = ("all/",)
    question: str = (
        "{{ question | trim }}\nA. {{ options[0] }}\nB. {{ options[1] }}\nC. {{ options[2] }}\nD. {{ options[3] }}\n"
        "Answer:"
    )
    instructions: str = (
        "The following are multiple choice questions (with answers) about {{ subject | replace('_', ' ') }}.\n\n"
    )
    choices: str = "['A', 'B', 'C', 'D']"
    subject: str = "subject"
    shots: Shots = FirstShots(num=5, split="dev", same_subject=True)

    hub: ClassVar[str] = "cais/mmlu"

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the records of a split, with their subjects."""
        for path in self.files(split):
            read = _lettered_csv(path) if path.suffix == ".csv" else read_records(path, BadRecords())
            for place, record in read:
                yield Placed(place, {"subject": _subject(path), **record})

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with its four ``options`` and the index of the right one."""
        options = record.get("choices") or [record[letter] for letter in _LETTERS if letter in record]
        if len(options) != len(_LETTERS):
            raise DataError(f"{len(options)} choices; four are needed, in 'choices' or in columns A to D.")
        answer = record.get("answer")
        index = _LETTERS.find(answer.strip()) if isinstance(answer, str) and answer.strip() else answer
        if isinstance(answer, str) and answer.strip().isdigit():
            index = int(answer)
        return {**record, "options": list(options), "answer": index}


def _lettered_csv(path: Path) -> Iterator[Placed]:
    """Yield the records of a file of question, four choices and a letter, with or without a line of column names."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            if tuple(row) == _COLUMNS or not row:
                continue
            place = Place(str(path), f"line {reader.line_num}")
            if len(row) != len(_COLUMNS):
                raise DataError(f"{place} has {len(row)} columns; question, four choices and a letter are needed.")
            yield Placed(place, dict(zip(_COLUMNS, row, strict=True)))


def _subject(path: Path) -> str:
    """Return the subject that the name of a file or folder gives."""
    named = re.fullmatch(r"(.+)_(?:dev|val|validation|test|train)", path.stem)
    return named[1] if named else path.parent.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMLUPro(GenerationTask):
    """Questions with up to ten choices, answered with reasoning; examples are those of the validation split."""

    name: str = "mmlu_pro"
    question: str = (
        "Question:\n{{ question }}\nOptions:\n"
        "{% for option in options[:10] %}{{ 'ABCDEFGHIJ'[loop.index0] }}. {{ option | trim }}\n{% endfor %}"
        "Answer: Let's think step by step."
    )
    solution: str = "{{ cot_content | replace(\"A: Let's think step by step. \", '') }}"
    subject: str = "category"
    stop: tuple[str, ...] = ("Question:",)
    max_new_tokens: int = 2048
    checks: Mapping[str, Check] = dataclasses.field(
        default_factory=lambda: {
            "exact_match": AnswerCheck(
                extract=(AnswerPattern(pattern=r"answer is \(?([ABCDEFGHIJ])\)?"),),
                same=SameText(ignore_case=True, ignore_punctuation=True),
            )
        }
    )
    shots: Shots = FirstShots(num=5, split="validation", same_subject=True)

    checks_cue: ClassVar[bool] = True
    hub: ClassVar[str] = "TIGER-Lab/MMLU-Pro"
    folders: ClassVar[tuple[str, ...]] = ("MMLU-Pro",)

    @property
    def chance(self) -> float:
        """One of ten."""
        return 0.1
