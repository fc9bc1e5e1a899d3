"""Grades of single answers by a judge, of each turn of a conversation, as MT-Bench gives them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lightning_lm.errors import DataError
from lightning_lm.evals.judges.exchanges import AnswerSet, matched
from lightning_lm.evals.judges.judge import Judge
from lightning_lm.evals.judges.prompts import GRADING_TEMPLATE, check_template, grading_prompt, reminder
from lightning_lm.evals.judges.verdicts import grade_in
from lightning_lm.evals.statistics import Score, score_of

__all__ = ["AnswerGrade", "GradingResult", "grade_answers"]

_LOWEST, _HIGHEST = 1.0, 10.0


@dataclasses.dataclass(frozen=True)
class AnswerGrade:
    """A judge's grade of one answer.

    Args:
        id: Id of the question.
        turn: Turn of the answer, from 1.
        grade: From 1 to 10; ``None`` where the judge gave none.
        category: Part of the set.
        failure: Reason why there is no grade, or nothing.
    """

    id: str
    turn: int
    grade: float | None
    category: str = ""
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class GradingResult:
    """Grades of one model.

    Args:
        model: Name of the model.
        score: Mean grade over all turns; its error is over questions, whose turns are not independent.
        turns: Mean grade of each turn, if there are several.
        categories: Mean grade of each category, if there are several.
        num_failures: Answers without a grade.
        grades: Grade of each answer.
    """

    model: str
    score: Score
    turns: Mapping[str, Score]
    categories: Mapping[str, Score]
    num_failures: int
    grades: Sequence[AnswerGrade]


def grade_answers(
    judge: Judge,
    answers: AnswerSet,
    *,
    template: str = GRADING_TEMPLATE,
    limit: int | None = None,
) -> GradingResult:
    """Return the grades of a model's answers; in a later turn the judge sees the turns before it.

    Args:
        judge: The judge.
        answers: Answers of the model.
        template: Prompt of the judge: a Jinja template of ``turns``, ``answers``, ``reference``, ``mark``.
        limit: Most questions, evenly spread; ``None`` for all.

    Raises:
        DataError: If no answer has a grade.
        ConfigurationError: If the template is faulty.
        RemoteError: If the judge breaks off; its replies so far are in its cache.
    """
    check_template(template, ("answers",))
    exchanges = [answers.exchanges[name] for name in matched([answers], limit)]
    asked = [(exchange, turn) for exchange in exchanges for turn in range(len(exchange.answers))]
    chats = [[{"role": "user", "content": grading_prompt(template, exchange, turn)}] for exchange, turn in asked]
    judgements = judge.ask(chats, grade_in(_LOWEST, _HIGHEST), reminder("grade"))
    grades = [
        AnswerGrade(exchange.question.id, turn + 1, one.verdict, exchange.question.category, one.failure)
        for (exchange, turn), one in zip(asked, judgements, strict=True)
    ]
    known = [grade for grade in grades if grade.grade is not None]
    if not known:
        raise DataError(f"The judge gave no grade to any of {len(grades)} answers of {answers.model}.")
    turns, categories = sorted({grade.turn for grade in known}), sorted({grade.category for grade in known})
    return GradingResult(
        answers.model,
        _score(known),
        {str(turn): _score([one for one in known if one.turn == turn]) for turn in turns if len(turns) > 1},
        {name: _score([one for one in known if one.category == name]) for name in categories if len(categories) > 1},
        len(grades) - len(known),
        grades,
    )


def _score(grades: Sequence[AnswerGrade]) -> Score:
    """Return a mean with its interval, within the grades that there are."""
    values = [grade.grade for grade in grades if grade.grade is not None]
    score = score_of(values, [grade.id for grade in grades])
    if math.isnan(score.standard_error):
        return score
    return dataclasses.replace(score, low=max(score.low, _LOWEST), high=min(score.high, _HIGHEST))
