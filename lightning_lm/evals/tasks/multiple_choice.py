"""Published multiple-choice tasks, in the prompts that lm-evaluation-harness scores them with.

HellaSwag (Zellers et al. 2019, arXiv:1905.07830), ARC (Clark et al. 2018, arXiv:1803.05457), PIQA (Bisk et al. 2019,
arXiv:1911.11641), WinoGrande (Sakaguchi et al. 2019, arXiv:1907.10641), BoolQ (Clark et al. 2019, arXiv:1905.10044)
and OpenBookQA (Mihaylov et al. 2018, arXiv:1809.02789). Each reads the files of its authors and those of the Hub.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning_lm.data.records import Placed
from lightning_lm.errors import DataError
from lightning_lm.evals.requests import Likelihood, Prompt
from lightning_lm.evals.task import Item
from lightning_lm.evals.tasks.choice import ChoiceTask
from lightning_lm.evals.tasks.few_shot import RandomShots, Shots
from lightning_lm.evals.tasks.record_task import Fields
from lightning_lm.evals.tasks.template import render_record

__all__ = ["ARC", "PIQA", "BoolQ", "HellaSwag", "OpenBookQA", "WinoGrande"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HellaSwag(ChoiceTask):
    """The likeliest of four endings of a text. By default the validation split, whose labels are published."""

    name: str = "hellaswag"
    split: str = "validation"
    question: str = "{{ query }}"
    choices: str = "endings"
    gold: str = "label"
    metric: str = "acc_norm"
    shots: Shots = RandomShots()

    hub: ClassVar[str] = "Rowan/hellaswag"

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with its ``query``: activity, first context and capitalised second one, without markers."""
        needed = ("activity_label", "ctx_a", "ctx_b", "endings")
        _require(record, *needed)
        query = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        endings = [_without_markers(ending) for ending in record["endings"]]
        return {"label": None, **record, "query": _without_markers(query), "endings": endings}


def _without_markers(text: str) -> str:
    """Return a text without the markers of WikiHow in brackets; a title ends a sentence."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARC(ChoiceTask):
    """Science questions of school examinations: ``arc_easy`` and ``arc_challenge``."""

    question: str = "Question: {{ question }}\nAnswer:"
    metric: str = "acc_norm"
    shots: Shots = RandomShots()

    hub: ClassVar[str] = "allenai/ai2_arc"
    folders: ClassVar[tuple[str, ...]] = ("arc", "ai2_arc", "ARC-V1-Feb2018-2", "ARC-V1-Feb2018")

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with ``question`` as text, ``choices`` as texts and ``answer`` as an index."""
        return _lettered(record, "question")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenBookQA(ChoiceTask):
    """Questions about elementary science facts, without the book."""

    name: str = "openbookqa"
    subset: tuple[str, ...] = ("main/",)
    question: str = "{{ question_stem }}"
    metric: str = "acc_norm"
    shots: Shots = RandomShots()

    hub: ClassVar[str] = "allenai/openbookqa"
    folders: ClassVar[tuple[str, ...]] = ("OpenBookQA-V1-Sep2018",)

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with ``question_stem`` as text, ``choices`` as texts and ``answer`` as an index."""
        return _lettered(record, "question_stem")


def _lettered(record: Mapping[str, Any], stem: str) -> Mapping[str, Any]:
    """Return a record of AI2 in one form: theirs nests the choices in the question, the Hub's has lists of them."""
    _require(record, "answerKey")
    question = record.get("question", record)
    if isinstance(question, Mapping) and "stem" in question:
        _require(question, "choices")
        labels = [str(choice["label"]) for choice in question["choices"]]
        texts, text = [choice["text"] for choice in question["choices"]], question["stem"]
    else:
        _require(record, stem, "choices")
        labels, texts, text = [*map(str, record["choices"]["label"])], record["choices"]["text"], record[stem]
    key = str(record["answerKey"]).strip()
    if key not in labels:
        raise DataError(f"answerKey={key!r} is none of the labels {labels}; use a split with answers.")
    return {**record, stem: text, "choices": list(texts), "answer": labels.index(key)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PIQA(ChoiceTask):
    """The way that reaches a goal, of two. Labels may stand in a file beside the records, ``dev-labels.lst``."""

    name: str = "piqa"
    split: str = "validation"
    question: str = "Question: {{ goal }}\nAnswer:"
    choices: str = "[sol1, sol2]"
    gold: str = "label"
    metric: str = "acc_norm"
    shots: Shots = RandomShots()

    hub: ClassVar[str] = "baber/piqa"
    folders: ClassVar[tuple[str, ...]] = ("physicaliqa-train-dev",)

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the records, with their labels."""
        return _with_labels(super().records(split), "label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinoGrande(ChoiceTask):
    """The name that fills the gap of a sentence, of two.

    Scored partially: for each name the sentence up to the gap is the context, and what follows the gap is scored
    (Trinh and Le 2018, arXiv:1806.02847).
    """

    name: str = "winogrande"
    split: str = "validation"
    subset: tuple[str, ...] = ("xl",)
    question: str = "{{ sentence.split('_')[0] }}{{ [option1, option2][gold] }}"
    choices: str = "[option1, option2]"
    gold: str = "gold"
    shots: Shots = RandomShots()

    hub: ClassVar[str] = "allenai/winogrande"
    folders: ClassVar[tuple[str, ...]] = ("winogrande_1.1",)

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the records, with their labels."""
        return _with_labels(super().records(split), "answer")

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with the index of the right name, and the text after the gap."""
        _require(record, "sentence", "option1", "option2", "answer")
        if record["sentence"].count("_") != 1:
            raise DataError(f"the sentence has {record['sentence'].count('_')} gaps ('_'); one is needed.")
        if str(record["answer"]) not in ("1", "2"):
            raise DataError(f"answer={record['answer']!r} must be 1 or 2; use a split with answers.")
        rest = record["sentence"].partition("_")[2].strip()
        return {**record, "gold": int(record["answer"]) - 1, "rest": rest}

    def item(self, fields: Fields, prompt: Prompt) -> Item:
        """Return the item of a sentence: one context for each name."""
        questions = [render_record(self.question, {**fields, "gold": index}, "question") for index in (0, 1)]
        requests = tuple(
            Likelihood(dataclasses.replace(prompt, question=question), self.delimiter + fields["rest"])
            for question in questions
        )
        return Item(id="", requests=requests, gold=fields["gold"])

    def searched_text(self, fields: Fields) -> str:
        """Return the sentence, with its gap."""
        return str(fields["sentence"])

    def shot_answer(self, fields: Fields) -> str:
        """Return the text after the gap."""
        return str(fields["rest"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoolQ(ChoiceTask):
    """Questions about a passage, answered by yes or no."""

    name: str = "boolq"
    split: str = "validation"
    question: str = "{{ passage }}\nQuestion: {{ question }}?\nAnswer:"
    choices: str = "['no', 'yes']"
    gold: str = "gold"
    cluster: str = "passage"
    shots: Shots = RandomShots()

    hub: ClassVar[str] = "google/boolq"

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with the index of its answer: SuperGLUE calls it ``label``, its authors ``answer``."""
        name = "answer" if "answer" in record else "label"
        _require(record, name)
        known = {"true": 1, "1": 1, "yes": 1, "false": 0, "0": 0, "no": 0}
        return {**record, "gold": known.get(str(record[name]).lower())}


def _with_labels(placed: Iterator[Placed], field: str) -> Iterator[Placed]:
    """Yield records with the labels of the file ``NAME-labels.lst`` beside ``NAME.jsonl``, if they have none."""
    labels: dict[str, list[str]] = {}
    places: dict[str, int] = {}
    for place, record in placed:
        path = Path(place.file)
        beside = path.with_name(f"{path.name.split('.')[0]}-labels.lst")
        if field in record or not beside.exists():
            yield Placed(place, record)
            continue
        known = labels.setdefault(place.file, beside.read_text().split())
        index = places[place.file] = places.get(place.file, -1) + 1
        if index >= len(known):
            raise DataError(f"{place}: {beside} has {len(known)} labels, one for each record is needed.")
        yield Placed(place, {**record, field: known[index]})


def _require(record: Mapping[str, Any], *fields: str) -> None:
    missing = [field for field in fields if field not in record]
    if missing:
        raise DataError(
            f"no field {', '.join(map(repr, missing))}; the record has {', '.join(map(repr, record)) or 'no fields'}."
        )
