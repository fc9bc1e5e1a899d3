"""Pairwise comparison of two models by a judge: both orders, a tie where they disagree, length control."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from lightning_lm.errors import DataError
from lightning_lm.evals.judges.exchanges import AnswerSet, Exchange, matched
from lightning_lm.evals.judges.judge import Judge, Judgement
from lightning_lm.evals.judges.length_control import length_controlled_win_rate
from lightning_lm.evals.judges.prompts import PAIRWISE_TEMPLATE, check_template, pairwise_prompt, reminder
from lightning_lm.evals.judges.verdicts import Side, side_in
from lightning_lm.evals.statistics import Score, bootstrap_scores, score_of

__all__ = [
    "PairVerdict",
    "PairwiseResult",
    "PositionBias",
    "compare_answers",
    "compare_pairs",
    "position_bias",
    "summarised",
]


@dataclasses.dataclass(frozen=True)
class PairVerdict:
    """A judge's verdicts on two answers to one question.

    Args:
        id: Id of the question.
        verdicts: Better answer when the first model's was shown first, and when it was shown second: ``first``,
            ``second`` (the model, not the place) or ``tie``; ``None`` where the judge gave none.
        lengths: Characters of both answers.
        category: Part of the set.
        failure: Reason why there is no verdict, or nothing.
        is_same: True if both answers are one text: a tie that the judge is not asked about.
    """

    id: str
    verdicts: tuple[str | None, str | None]
    lengths: tuple[int, int]
    category: str = ""
    failure: str = ""
    is_same: bool = False

    @property
    def preference(self) -> float | None:
        """1 if the first won in both orders, 0 if the second did, 0.5 if neither, ``None`` if a verdict is missing."""
        one, other = self.verdicts
        if one is None or other is None:
            return None
        return {"first": 1.0, "second": 0.0, "tie": 0.5}[one] if one == other else 0.5


@dataclasses.dataclass(frozen=True)
class PositionBias:
    """Verdicts of a judge over both orders.

    Args:
        num_pairs: Pairs with a verdict in both orders that the judge was asked about.
        consistent: Fraction with the same verdict in both.
        first: Fraction in which the answer that stood first won both times.
        second: Fraction in which the answer that stood second won both times.
    """

    num_pairs: int
    consistent: float
    first: float
    second: float


@dataclasses.dataclass(frozen=True)
class PairwiseResult:
    """Comparison of a model with a baseline.

    Args:
        model: Name of the model.
        baseline: Name of the other one.
        win_rate: Mean preference for the model, a tie is half a win.
        length_controlled: The win rate at equal lengths; ``None`` if lengths and preferences cannot be told apart.
        counts: Wins, ties and losses of the model, and failures.
        bias: Consistency over both orders.
        categories: Win rate in each category, if there are several.
        mean_lengths: Mean length of each model's answers. Characters.
        comparisons: Verdicts on each question.
    """

    model: str
    baseline: str
    win_rate: Score
    length_controlled: Score | None
    counts: Mapping[str, int]
    bias: PositionBias
    categories: Mapping[str, Score]
    mean_lengths: tuple[float, float]
    comparisons: Sequence[PairVerdict]


def compare_answers(
    judge: Judge,
    model: AnswerSet,
    baseline: AnswerSet,
    *,
    template: str = PAIRWISE_TEMPLATE,
    limit: int | None = None,
) -> PairwiseResult:
    """Return the win rate of a model against a baseline on the questions that both answered.

    Args:
        judge: The judge; it is asked twice about each pair, in both orders.
        model: Answers of the model.
        baseline: Answers of the baseline.
        template: Prompt of the judge: a Jinja template of ``turns``, ``first``, ``second``, ``reference``, ``mark``.
        limit: Most questions, evenly spread; ``None`` for all.

    Raises:
        DataError: If no question was answered by both, or no pair has a verdict.
        ConfigurationError: If the template is faulty.
        RemoteError: If the judge breaks off; its replies so far are in its cache.
    """
    ids = matched([model, baseline], limit)
    pairs = [(model.exchanges[name], baseline.exchanges[name]) for name in ids]
    comparisons = compare_pairs(judge, pairs, template=template)
    return summarised(model.model, baseline.model, comparisons)


def compare_pairs(
    judge: Judge,
    pairs: Sequence[tuple[Exchange, Exchange]],
    *,
    template: str = PAIRWISE_TEMPLATE,
) -> list[PairVerdict]:
    """Return the verdicts on pairs of answers, each in both orders.

    Args:
        judge: The judge.
        pairs: Two exchanges on one question each.
        template: Prompt of the judge.

    Raises:
        ConfigurationError: If the template is faulty.
        RemoteError: If the judge breaks off; its replies so far are in its cache.
    """
    check_template(template, ("first", "second"))
    asked = [(one, other) for one, other in pairs if one.answers != other.answers]
    judge.advance(2 * (len(pairs) - len(asked)))
    orders = [order for one, other in asked for order in ((one, other), (other, one))]
    chats = [[{"role": "user", "content": pairwise_prompt(template, *order)}] for order in orders]
    judgements: Iterator[Judgement[Side]] = iter(judge.ask(chats, side_in, reminder("pairwise")))
    return [
        _same(one) if one.answers == other.answers else _comparison(one, other, next(judgements), next(judgements))
        for one, other in pairs
    ]


def summarised(model: str, baseline: str, comparisons: Sequence[PairVerdict]) -> PairwiseResult:
    """Return the result of comparisons.

    Args:
        model: Name of the first model.
        baseline: Name of the second.
        comparisons: Verdicts on each question.

    Raises:
        DataError: If none has a verdict in both orders.
    """
    known = [(one, one.preference) for one in comparisons if one.preference is not None]
    if not known:
        failure = next((one.failure for one in comparisons if one.failure), "")
        raise DataError(f"The judge gave no verdict in both orders to any of {len(comparisons)} pairs. {failure}")
    values = [preference for _, preference in known]
    names = sorted({one.category for one, _ in known})
    return PairwiseResult(
        model,
        baseline,
        _rate(values),
        _length_controlled([one for one, _ in known], values),
        {
            "wins": values.count(1.0),
            "ties": values.count(0.5),
            "losses": values.count(0.0),
            "failures": len(comparisons) - len(known),
        },
        position_bias([one for one, _ in known]),
        {name: _rate([value for one, value in known if one.category == name]) for name in names if len(names) > 1},
        (
            math.fsum(one.lengths[0] for one in comparisons) / len(comparisons),
            math.fsum(one.lengths[1] for one in comparisons) / len(comparisons),
        ),
        comparisons,
    )


def _rate(preferences: Sequence[float]) -> Score:
    """Return a mean preference with its interval, within 0 to 1."""
    score = score_of(preferences)
    return dataclasses.replace(score, low=max(score.low, 0.0), high=min(score.high, 1.0))


def _comparison(one: Exchange, other: Exchange, straight: Judgement[Side], swapped: Judgement[Side]) -> PairVerdict:
    models = {"A": "first", "B": "second", "tie": "tie"}, {"A": "second", "B": "first", "tie": "tie"}
    verdicts = [
        None if judgement.verdict is None else names[judgement.verdict]
        for judgement, names in zip((straight, swapped), models, strict=True)
    ]
    lengths = (one.num_characters, other.num_characters)
    failure = straight.failure or swapped.failure
    return PairVerdict(one.question.id, (verdicts[0], verdicts[1]), lengths, one.question.category, failure)


def _same(one: Exchange) -> PairVerdict:
    length = one.num_characters
    return PairVerdict(one.question.id, ("tie", "tie"), (length, length), one.question.category, is_same=True)


def _length_controlled(comparisons: Sequence[PairVerdict], preferences: Sequence[float]) -> Score | None:
    differences = [float(one.lengths[0] - one.lengths[1]) for one in comparisons]

    def aggregate(indices: Sequence[int]) -> dict[str, float]:
        chosen = [preferences[index] for index in indices], [differences[index] for index in indices]
        value = length_controlled_win_rate(*chosen).win_rate
        return {} if math.isnan(value) else {"win_rate": value}

    return bootstrap_scores(aggregate, len(preferences)).get("win_rate")


def position_bias(comparisons: Sequence[PairVerdict]) -> PositionBias:
    """Return how often the place of an answer won, over the pairs that the judge gave a verdict in both orders.

    Args:
        comparisons: Verdicts on pairs.
    """
    asked = [one.verdicts for one in comparisons if one.preference is not None and not one.is_same]
    count = len(asked)
    if not count:
        return PositionBias(0, math.nan, math.nan, math.nan)
    # The names of models change with the order; where the place's name stays, the place was judged.
    return PositionBias(
        count,
        sum(one == other for one, other in asked) / count,
        asked.count(("first", "second")) / count,
        asked.count(("second", "first")) / count,
    )
