"""Pairs of answers that people have judged: our own form, AlpacaEval's annotations and MT-Bench's human judgements."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lm.data.records import Place, read_records
from lightning_lm.errors import DataError
from lightning_lm.evals.judges.exchanges import Exchange, Question, question_of, turns_of_messages

__all__ = ["LabelledPair", "load_labels"]

_SIDES = (("output_1", "output_2"), ("output_a", "output_b"), ("answer_a", "answer_b"), ("chosen", "rejected"))
_LABELS = {
    "first": "first", "second": "second", "tie": "tie", "1": "first", "2": "second", "0": "tie", "1.0": "first",
    "2.0": "second", "0.0": "tie", "1.5": "tie", "a": "first", "b": "second", "model_a": "first", "model_b": "second",
    "tie (inconsistent)": "tie", "draw": "tie",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LabelledPair:
    """Two answers to one question, and what people said.

    Args:
        first: The question with the first answer.
        second: The question with the second answer.
        labels: ``first``, ``second`` or ``tie``, one for each person.
    """

    first: Exchange
    second: Exchange
    labels: tuple[str, ...]


def load_labels(path: Path | str) -> list[LabelledPair]:
    """Read pairs of answers with people's labels; records of the same pair are labels of several people.

    A record has a prompt as answers do, two answers (``output_1`` and ``output_2``, ``answer_a`` and ``answer_b``, or
    ``conversation_a`` and ``conversation_b``), and a label in ``preference`` (1, 2; 0 or 1.5 for a tie) or ``winner``
    (``first``, ``second``, ``tie``, ``model_a``, ``model_b``, or the name in ``model_a`` or ``model_b``). A record with
    ``chosen`` and ``rejected`` needs no label.

    Args:
        path: JSON lines, a JSON list, CSV or Parquet.

    Raises:
        DataError: If a record does not fit; names file, place and field.
    """
    pairs: dict[Any, tuple[Exchange, Exchange, list[str]]] = {}
    for place, record in read_records(Path(path)):
        first, second = _exchanges(record, place)
        key = (first.question.turns, first.answers, second.answers)
        pairs.setdefault(key, (first, second, []))[2].append(_label(record, place))
    return [LabelledPair(first, second, tuple(labels)) for first, second, labels in pairs.values()]


def _exchanges(record: Mapping[str, Any], place: Place) -> tuple[Exchange, Exchange]:
    if "conversation_a" in record and "conversation_b" in record:
        one, other = (_conversation(record, name, place) for name in ("conversation_a", "conversation_b"))
        return one, other
    question = question_of(record, place)
    if question is None:
        raise DataError(f"{place} has no prompt: give it turns, instruction, prompt, question or messages.")
    names = next((names for names in _SIDES if all(name in record for name in names)), None)
    if names is None:
        raise DataError(
            f"{place} has no two answers: give it output_1 and output_2, answer_a and answer_b, or conversation_a and "
            f"conversation_b; it has {', '.join(map(repr, record))}."
        )
    answers = []
    for name in names:
        value = record[name]
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}, field {name!r}: expected a text, or a list of one for each turn.")
        if len(texts) != len(question.turns):
            raise DataError(f"{place}, field {name!r}: {len(texts)} answer(s) to {len(question.turns)} turn(s).")
        answers.append(tuple(texts))
    return Exchange(question, answers[0]), Exchange(question, answers[1])


def _conversation(record: Mapping[str, Any], field: str, place: Place) -> Exchange:
    turns, answers = turns_of_messages(record[field], f"{place}, field {field!r}")
    count = record.get("turn", len(turns))
    if not isinstance(count, int) or not 1 <= count <= len(turns) or len(answers) != len(turns):
        raise DataError(
            f"{place}, field {field!r}: {len(turns)} turn(s) of the user and {len(answers)} answer(s), of which turn "
            f"{count!r} was judged."
        )
    name = f"{record.get('question_id', turns[0])}, turn {count}"
    return Exchange(Question(name, turns[:count]), answers[:count])


def _label(record: Mapping[str, Any], place: Place) -> str:
    field = next((name for name in ("preference", "winner", "label") if record.get(name) is not None), None)
    if field is None:
        if "chosen" in record and "rejected" in record:
            return "first"
        raise DataError(f"{place} has no label: give it preference (1, 2, or 0 for a tie) or winner.")
    said = str(record[field]).strip()
    names = {str(record.get("model_a")): "first", str(record.get("model_b")): "second"}
    label = _LABELS.get(said.lower()) or names.get(said)
    if label is None:
        raise DataError(f"{place}, field {field!r}: {said[:60]!r} is none of first, second, tie, 1, 2, 0.")
    return label
