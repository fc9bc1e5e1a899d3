"""Prompts and models' answers to them, read from files: our own form, AlpacaEval's, and MT-Bench's with its questions.

An exchange is a conversation of one or several turns of a user with a model's answer to each.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lm.data.records import Place, read_records
from lightning_lm.errors import DataError

__all__ = [
    "AnswerSet",
    "Exchange",
    "Question",
    "load_answers",
    "load_questions",
    "matched",
    "question_of",
    "turns_of_messages",
]

_ID = ("id", "question_id")
_PROMPT = ("turns", "instruction", "prompt", "question")
_ANSWER = ("outputs", "output", "answer", "completion", "response")
_MODEL = ("generator", "model_id", "model")
_CATEGORY = ("category", "dataset")
_FORMS = (
    "one of messages, instruction, prompt, question or turns for the prompt, and one of output, answer, completion, "
    "response or choices for the answer"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """Turns of a user.

    Args:
        id: Name in the results.
        turns: Each turn's text; later ones follow the answer to the one before.
        reference: Reference answer to each turn, or nothing.
        category: Part of the set whose score is shown by itself; empty if there are none.
        system: System message of the conversation.
    """

    id: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    category: str = ""
    system: str = ""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question with a model's answers.

    Args:
        question: The question.
        answers: Answer to each turn.
    """

    question: Question
    answers: tuple[str, ...]

    @property
    def num_characters(self) -> int:
        """Length of the answers. Characters."""
        return sum(map(len, self.answers))


@dataclasses.dataclass(frozen=True)
class AnswerSet:
    """Answers of one model.

    Args:
        model: Name of the model.
        exchanges: Exchange by the question's id.
    """

    model: str
    exchanges: Mapping[str, Exchange]


def load_questions(path: Path | str) -> dict[str, Question]:
    """Read questions by id, such as MT-Bench's ``question.jsonl`` or a file of instructions.

    Args:
        path: JSON lines, a JSON list, CSV or Parquet.

    Raises:
        DataError: If a record has no prompt, or two have one id; names file, place and field.
    """
    questions: dict[str, Question] = {}
    for place, record in read_records(Path(path)):
        found = question_of(record, place)
        if found is None:
            raise DataError(f"{place} has no prompt: give it turns, instruction, prompt, question or messages.")
        found = _numbered(found, record, questions)
        _refuse_second(found.id, questions, place)
        questions[found.id] = found
    return questions


def load_answers(path: Path | str, questions: Mapping[str, Question] | None = None) -> AnswerSet:
    """Read a model's answers.

    The name of the model is the record's ``generator``, ``model_id`` or ``model``, or else the name of the file.

    Args:
        path: JSON lines, a JSON list, CSV or Parquet.
        questions: Questions by id, for answers that come without their prompts, as MT-Bench's do.

    Raises:
        DataError: If a record has no prompt or no answer, two have one id, or several models are in the file; names
            file, place and field.
    """
    path, models = Path(path), dict[str, Place]()
    exchanges: dict[str, Exchange] = {}
    for place, record in read_records(path):
        question = question_of(record, place) or _asked(record, questions, place)
        question = _numbered(question, record, exchanges)
        answers = _answers(record, place)
        if len(answers) != len(question.turns):
            raise DataError(f"{place} has {len(answers)} answer(s) to the {len(question.turns)} turn(s) of its prompt.")
        _refuse_second(question.id, exchanges, place)
        exchanges[question.id] = Exchange(question, answers)
        models.setdefault(str(_first(record, _MODEL) or path.stem), place)
    if len(models) > 1:
        (one, first), (other, second) = list(models.items())[:2]
        raise DataError(f"{first} is of the model {one!r}, {second} of {other!r}; give each model a file of its own.")
    return AnswerSet(next(iter(models), path.stem), exchanges)


def matched(sets: Sequence[AnswerSet], limit: int | None = None) -> list[str]:
    """Return the ids of the questions that all models have answered, evenly thinned out to the limit.

    Args:
        sets: Answers of the models.
        limit: Most questions; ``None`` for all.

    Raises:
        DataError: If there is none, or two models answered other turns under one id.
    """
    first, *others = sets
    common = [name for name in first.exchanges if all(name in other.exchanges for other in others)]
    if not common:
        shown = "; ".join(f"{one.model}: {next(iter(one.exchanges), '')[:60]!r}, ..." for one in sets)
        raise DataError(f"No prompt was answered by all of {len(sets)} models. Ids or prompts must be equal ({shown}).")
    for name in common:
        for other in others:
            if other.exchanges[name].question.turns != first.exchanges[name].question.turns:
                raise DataError(f"The prompt {name[:60]!r} is another text in {other.model} than in {first.model}.")
    if limit is None or limit >= len(common):
        return common
    return [common[index * len(common) // limit] for index in range(limit)]


def turns_of_messages(messages: Any, place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the texts of the user and those of the assistant.

    Args:
        messages: List of turns with ``role`` and ``content``.
        place: Place of the list, for messages.

    Raises:
        DataError: If it is no such list, or has no turn of the user.
    """
    if isinstance(messages, list) and all(_is_message(turn) for turn in messages):
        user, assistant = (
            tuple(turn["content"] for turn in messages if turn["role"] == role) for role in ("user", "assistant")
        )
        if user:
            return user, assistant
    raise DataError(f"{place}: expected a list of messages with role and content, one of them the user's.")


def question_of(record: Mapping[str, Any], place: Place) -> Question | None:
    """Return the question of a record, or ``None`` if it has none.

    Args:
        record: Fields of the record.
        place: Its place, for messages.

    Raises:
        DataError: If a field is of another kind than expected.
    """
    system, turns = _turns(record, place)
    if not turns:
        return None
    given = _first(record, _ID)
    reference = record.get("reference")
    references = [reference] if isinstance(reference, str) else reference or []
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise DataError(f"{place}, field 'reference': expected a text or a list of texts, one for each turn.")
    name = "\n".join(turns) if given is None else str(given)
    system = system or str(record.get("system") or "")
    return Question(name, turns, tuple(references), str(_first(record, _CATEGORY) or ""), system)


def _turns(record: Mapping[str, Any], place: Place) -> tuple[str, tuple[str, ...]]:
    field = next((name for name in ("messages", *_PROMPT) if record.get(name)), None)
    value = record.get(field) if field else None
    if isinstance(value, str):
        more = record.get("input")  # of Alpaca's instructions
        return "", (f"{value}\n\n{more}" if field == "instruction" and isinstance(more, str) and more else value,)
    if value is None:
        return "", ()
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        return "", tuple(value)
    if isinstance(value, list) and value and all(_is_message(turn) for turn in value):
        texts = {role: [turn["content"] for turn in value if turn["role"] == role] for role in ("system", "user")}
        if texts["user"]:
            return "\n".join(texts["system"]), tuple(texts["user"])
    raise DataError(f"{place}, field {field!r}: expected a text, a list of texts, or messages with a user's turn.")


def _answers(record: Mapping[str, Any], place: Place) -> tuple[str, ...]:
    if "choices" in record:
        choices = record["choices"]
        first = choices[0] if isinstance(choices, list) and choices else None
        turns: Any = first.get("turns") if isinstance(first, dict) else None
        if not _are_texts(turns):
            raise DataError(f"{place}, field 'choices': expected [{{'turns': [text, ...]}}], as MT-Bench writes it.")
        return tuple(turns)
    field = next((name for name in _ANSWER if record.get(name) is not None), None)
    value: Any = record.get(field) if field else _of_assistant(record)
    if isinstance(value, str):
        return (value,)
    if not _are_texts(value):
        what = f", field {field!r}: expected a text or a list of texts" if field else " has no answer"
        raise DataError(f"{place}{what}. A record needs {_FORMS}; it has {', '.join(map(repr, record))}.")
    return tuple(value)


def _of_assistant(record: Mapping[str, Any]) -> list[str]:
    messages = record.get("messages")
    found = messages if isinstance(messages, list) else []
    return [turn["content"] for turn in found if _is_message(turn) and turn["role"] == "assistant"]


def _asked(record: Mapping[str, Any], questions: Mapping[str, Question] | None, place: Place) -> Question:
    name = _first(record, _ID)
    if questions is not None and name is not None and str(name) in questions:
        return questions[str(name)]
    if name is None:
        raise DataError(f"{place} has no prompt. A record needs {_FORMS}; it has {', '.join(map(repr, record))}.")
    remedy = "give the file of its question: --questions question.jsonl" if questions is None else "add it there"
    raise DataError(f"{place}: no question has the id {name!r}; {remedy}.")


def _numbered(question: Question, record: Mapping[str, Any], known: Mapping[str, Any]) -> Question:
    """Return the question with a number after its id if it has no id of its own and its prompt came before."""
    if _first(record, _ID) is not None or question.id not in known:
        return question
    number = next(number for number in itertools.count(2) if f"{question.id} ({number})" not in known)
    return dataclasses.replace(question, id=f"{question.id} ({number})")


def _refuse_second(name: str, known: Mapping[str, Any], place: Place) -> None:
    if name in known:
        raise DataError(f"{place} repeats {name[:60]!r}; give each prompt an id of its own.")


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(text, str) for text in value)
