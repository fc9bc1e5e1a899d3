"""Answers of a model to questions of one or several turns, in a file that judges read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lm.errors import RemoteError
from lightning_lm.evals.judges.exchanges import AnswerSet, Exchange, Question
from lightning_lm.evals.judges.judge import Judge
from lightning_lm.storage import replacing

__all__ = ["answer_questions", "save_answers"]


def answer_questions(
    model: Judge,
    name: str,
    questions: Mapping[str, Question],
) -> AnswerSet:
    """Return the answers of a model, turn by turn.

    Args:
        model: The model, with its cache.
        name: Name of the model.
        questions: Question by id.

    Raises:
        RemoteError: If the model breaks off or refuses a question; its replies so far are in the cache.
    """
    answers: dict[str, list[str]] = {one: [] for one in questions}
    for turn in range(max((len(question.turns) for question in questions.values()), default=0)):
        asked = [question for question in questions.values() if turn < len(question.turns)]
        replies = model.replies([_chat(question, answers[question.id]) for question in asked])
        for question, reply in zip(asked, replies, strict=True):
            if reply.refusal:
                raise RemoteError(f"The question {question.id[:60]!r}, turn {turn + 1}, was refused: {reply.refusal}")
            answers[question.id].append(reply.text.strip())
    return AnswerSet(name, {one: Exchange(questions[one], tuple(answers[one])) for one in questions})


def save_answers(answers: AnswerSet, path: Path | str) -> None:
    """Write answers as JSON lines that `load_answers` reads, as a whole or not at all.

    Args:
        answers: The answers.
        path: File to write.
    """
    with replacing(Path(path)) as file:
        for exchange in answers.exchanges.values():
            question = exchange.question
            record: dict[str, Any] = {"id": question.id, "turns": question.turns, "outputs": exchange.answers}
            more = {"reference": question.reference, "category": question.category, "system": question.system}
            record |= {name: value for name, value in more.items() if value} | {"model": answers.model}
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def _chat(question: Question, answers: Sequence[str]) -> list[dict[str, str]]:
    """Return the conversation up to the turn that is to be answered."""
    turns = [{"role": "system", "content": question.system}] if question.system else []
    for user, answer in zip(question.turns, answers, strict=False):
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": question.turns[len(answers)]}]
