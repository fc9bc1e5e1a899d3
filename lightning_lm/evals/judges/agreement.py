"""Agreement of a judge with people, raw and beyond chance: measure it before a judge is trusted."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from lightning_lm.errors import DataError
from lightning_lm.evals.judges.judge import Judge
from lightning_lm.evals.judges.labels import LabelledPair
from lightning_lm.evals.judges.pairwise import PairVerdict, PositionBias, compare_pairs, position_bias
from lightning_lm.evals.judges.prompts import PAIRWISE_TEMPLATE
from lightning_lm.evals.statistics import Score, bootstrap_scores, score_of

__all__ = ["AgreementResult", "agreement_scores", "cohens_kappa", "compare_with_people"]

_LABELS = {1.0: "first", 0.0: "second", 0.5: "tie"}


@dataclasses.dataclass(frozen=True)
class AgreementResult:
    """Agreement of a judge with people's labels.

    Args:
        agreement: Fraction of labels that are the judge's verdict; errors are over pairs.
        kappa: Cohen's kappa; ``None`` if judge and people give one label alone.
        without_ties: Agreement on the labels where neither side says tie; ``None`` if there are none.
        people: Agreement of two people on one pair, the ceiling of a judge; ``None`` if no pair has two labels.
        table: Labels by the judge's verdict and by the people's: ``first``, ``second``, ``tie``.
        bias: Consistency of the judge over both orders.
        num_failures: Pairs without a verdict.
        comparisons: Verdicts on each pair.
    """

    agreement: Score
    kappa: Score | None
    without_ties: Score | None
    people: float | None
    table: Mapping[str, Mapping[str, int]]
    bias: PositionBias
    num_failures: int
    comparisons: Sequence[PairVerdict]


def compare_with_people(
    judge: Judge,
    pairs: Sequence[LabelledPair],
    *,
    template: str = PAIRWISE_TEMPLATE,
) -> AgreementResult:
    """Ask a judge about pairs that people have labelled, and return how often they agree.

    Args:
        judge: The judge; it is asked twice about each pair.
        pairs: The pairs.
        template: Prompt of the judge, as of `compare_answers`.

    Raises:
        DataError: If no pair has a verdict.
        RemoteError: If the judge breaks off; its replies so far are in its cache.
    """
    comparisons = compare_pairs(judge, [(one.first, one.second) for one in pairs], template=template)
    rows = [
        (str(place), _LABELS[comparison.preference], label)
        for place, (pair, comparison) in enumerate(zip(pairs, comparisons, strict=True))
        if comparison.preference is not None
        for label in pair.labels
    ]
    if not rows:
        raise DataError(f"The judge gave no verdict in both orders to any of {len(pairs)} pairs.")
    clusters, verdicts, labels = (list(column) for column in zip(*rows, strict=True))
    scores = agreement_scores(verdicts, labels, clusters)
    decided = [row for row in rows if "tie" not in row[1:]]
    counts = Counter((verdict, label) for _, verdict, label in rows)
    return AgreementResult(
        scores["agreement"],
        scores.get("kappa"),
        score_of([float(one == other) for _, one, other in decided], [row[0] for row in decided]) if decided else None,
        _agreement_of_people(pairs),
        {one: {other: counts[one, other] for other in _LABELS.values()} for one in _LABELS.values()},
        position_bias(comparisons),
        sum(one.preference is None for one in comparisons),
        comparisons,
    )


def _agreement_of_people(pairs: Sequence[LabelledPair]) -> float | None:
    """Return the mean over pairs of the fraction of two people's labels that are equal."""
    several = [list(itertools.combinations(pair.labels, 2)) for pair in pairs if len(pair.labels) > 1]
    if not several:
        return None
    return math.fsum(sum(one == other for one, other in each) / len(each) for each in several) / len(several)


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Return Cohen's kappa: agreement beyond that of two raters who draw labels by their own frequencies.

    Args:
        first: Labels of a rater.
        second: Labels of another, of the same items; NaN is returned if both give one and the same label alone.

    Raises:
        DataError: If there are none, or not equally many.

    Source:
        Cohen 1960, Educational and Psychological Measurement 20, 37-46.

    Example:
        >>> round(cohens_kappa("yyyn", "yynn"), 3)
        0.5
    """
    if not first or len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} labels are no pairs; give both raters' of the same items.")
    count = len(first)
    observed = sum(one == other for one, other in zip(first, second, strict=True)) / count
    labels = set(first) | set(second)
    by_chance = sum(list(first).count(label) * list(second).count(label) for label in labels) / count**2
    return math.nan if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def agreement_scores(
    judge: Sequence[Hashable], people: Sequence[Hashable], clusters: Sequence[str] | None = None
) -> dict[str, Score]:
    """Return ``agreement``, the fraction of equal labels, and ``kappa``, with their intervals.

    Args:
        judge: The judge's labels.
        people: Labels of people, of the same items.
        clusters: Item of each pair of labels, if several people labelled one.

    Raises:
        DataError: If there are none, or not equally many.
    """
    kappa = cohens_kappa(judge, people)
    equal = [float(one == other) for one, other in zip(judge, people, strict=True)]

    def drawn(indices: Sequence[int]) -> dict[str, float]:
        value = cohens_kappa([judge[index] for index in indices], [people[index] for index in indices])
        return {} if math.isnan(value) else {"kappa": value}

    scores = {"agreement": score_of(equal, clusters)}
    if not math.isnan(kappa):
        scores |= bootstrap_scores(drawn, len(equal), clusters)
    return scores
