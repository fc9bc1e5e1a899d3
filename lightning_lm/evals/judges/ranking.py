"""Ranking of several models: a judge compares every pair, and Bradley-Terry ratings are fitted to all verdicts."""

import dataclasses
import itertools
from collections.abc import Sequence

from lightning_lm.errors import ConfigurationError
from lightning_lm.evals.judges.bradley_terry import Battle, BradleyTerry, fit_bradley_terry
from lightning_lm.evals.judges.exchanges import AnswerSet, matched
from lightning_lm.evals.judges.judge import Judge
from lightning_lm.evals.judges.pairwise import PairwiseResult, compare_pairs, summarised
from lightning_lm.evals.judges.prompts import PAIRWISE_TEMPLATE

__all__ = ["Ranking", "rank_answers"]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Models in the order of their ratings.

    Args:
        ratings: Rating of each model, the highest first.
        pairs: Comparison of each two models.
    """

    ratings: BradleyTerry
    pairs: Sequence[PairwiseResult]


def rank_answers(
    judge: Judge,
    models: Sequence[AnswerSet],
    *,
    anchor: str | None = None,
    template: str = PAIRWISE_TEMPLATE,
    limit: int | None = None,
) -> Ranking:
    """Return the ratings of models on the questions that all of them answered.

    Args:
        judge: The judge; it is asked twice about each pair of answers.
        models: Answers of each model.
        anchor: Model whose rating is 1000; by default the first one.
        template: Prompt of the judge, as of `compare_answers`.
        limit: Most questions, evenly spread; ``None`` for all.

    Raises:
        ConfigurationError: If two models have one name, or the anchor is none of them.
        DataError: If no question was answered by all, or two models have no verdict.
        RemoteError: If the judge breaks off; its replies so far are in its cache.
    """
    names = [one.model for one in models]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigurationError(
            f"Two models or more with different names are ranked, not {', '.join(names)}. The name is the field model "
            "of the records, or that of the file."
        )
    if anchor is not None and anchor not in names:
        raise ConfigurationError(f"The anchor {anchor!r} is none of the models: {', '.join(names)}.")
    ids = matched(models, limit)
    duels = list(itertools.combinations(models, 2))
    pairs = [(one.exchanges[name], other.exchanges[name]) for one, other in duels for name in ids]
    comparisons = compare_pairs(judge, pairs, template=template)
    results = [
        summarised(one.model, other.model, comparisons[place * len(ids) : (place + 1) * len(ids)])
        for place, (one, other) in enumerate(duels)
    ]
    battles = [
        Battle(result.model, result.baseline, one.preference, one.id)
        for result in results
        for one in result.comparisons
        if one.preference is not None
    ]
    return Ranking(fit_bradley_terry(battles, anchor=anchor or names[0]), results)
