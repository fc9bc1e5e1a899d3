"""Results of judges: tables that fit into 80 columns, and JSON with all that is needed to repeat them."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_lm.evals.judges.agreement import AgreementResult
from lightning_lm.evals.judges.grading import GradingResult
from lightning_lm.evals.judges.judge import Judge, Prices
from lightning_lm.evals.judges.pairwise import PairwiseResult, PositionBias
from lightning_lm.evals.judges.ranking import Ranking
from lightning_lm.evals.report import interval_text, number_text, score_table
from lightning_lm.evals.results import plain_json
from lightning_lm.evals.runner import versions
from lightning_lm.evals.statistics import Score
from lightning_lm.storage import replacing

__all__ = ["JudgeResult", "judge_table", "save_result"]

JudgeResult = PairwiseResult | Ranking | AgreementResult | Sequence[GradingResult]
_FORMAT = 1
_WIDTH = 78
"""Columns of a table, whose notes are broken at its width."""


def save_result(result: JudgeResult, path: Path | str, judge: Judge, template: str, prices: Prices | None) -> None:
    """Write a result as JSON, as a whole or not at all; infinite ratings and unknown numbers become ``null``.

    Args:
        result: The result.
        path: File to write.
        judge: The judge, with what it cost.
        template: Prompt of the judge.
        prices: Prices of a million tokens; ``None`` if they are not known.
    """
    kinds = {PairwiseResult: "pairwise", Ranking: "rank", AgreementResult: "agreement"}
    plain = [dataclasses.asdict(one) for one in (result if isinstance(result, Sequence) else [result])]
    content: dict[str, Any] = {
        "format": _FORMAT,
        "kind": kinds.get(type(result), "grade"),
        "result": plain if isinstance(result, Sequence) else plain[0],
        "judge": judge.model.description,
        "template": template,
        "retries": judge.retries,
        "usage": dataclasses.asdict(judge.usage),
        "cost": None if prices is None else dict(zip(("all", "this_run"), judge.usage.cost(prices), strict=True)),
        "versions": versions(),
    }
    with replacing(Path(path)) as file:
        file.write((json.dumps(plain_json(content), indent=1, ensure_ascii=False) + "\n").encode())


def judge_table(result: JudgeResult) -> Table:
    """Return the table of a result.

    Args:
        result: The result.
    """
    if isinstance(result, PairwiseResult):
        return _pairwise(result)
    if isinstance(result, Ranking):
        return _ranking(result)
    return _agreement(result) if isinstance(result, AgreementResult) else _grades(result)


def _pairwise(result: PairwiseResult) -> Table:
    table = _scores(f"{result.model} against {result.baseline}", "pairs")
    _row(table, "win rate", result.win_rate)
    if result.length_controlled is not None:
        _row(table, "  at equal lengths", result.length_controlled)
    for name, score in result.categories.items():
        _row(table, f"  of {name or '(none)'}", score)
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items() if count or name != "failures")
    lengths = "{:,.0f} and {:,.0f} characters".format(*result.mean_lengths)
    notes = [f"{counts[:1].upper()}{counts[1:]}. Mean lengths: {lengths}.", _bias_text(result.bias)]
    if result.length_controlled is None:
        notes.append("All answers differ in length by the same, so there is no rate at equal lengths.")
    table.caption = "\n".join(notes)
    return table


def _ranking(result: Ranking) -> Table:
    table = score_table(f"Ratings ({result.ratings.anchor} is the anchor)")
    table.min_width = _WIDTH
    table.add_column("model", overflow="fold")
    for name in ("rating", "95 % interval", "win rate", "comparisons"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in result.ratings.ratings:
        interval = f"{_rating(one.low)} to {_rating(one.high)}" if one.low != one.high else "-"
        table.add_row(Text(one.model), _rating(one.rating), interval, number_text(one.win_rate), f"{one.num_battles:,}")
    notes = ["400 points are odds of ten to one."]
    if any(not math.isfinite(one.rating) for one in result.ratings.ratings):
        notes.append("Infinite: won, or lost, every comparison with the models on the anchor's side.")
    failures = sum(pair.counts["failures"] for pair in result.pairs)
    if failures:
        notes.append(f"{failures} pairs have no verdict and count for nothing.")
    table.caption = "\n".join(notes)
    return table


def _grades(results: Sequence[GradingResult]) -> Table:
    table = _scores("Grades from 1 to 10", "answers")
    for result in results:
        _row(table, result.model, result.score)
        for turn, score in result.turns.items():
            _row(table, f"  turn {turn}", score)
        for name, score in result.categories.items():
            _row(table, f"  of {name or '(none)'}", score)
        table.add_section()
    failed = [f"{one.model}: {one.num_failures} answers have no grade." for one in results if one.num_failures]
    table.caption = "\n".join(failed) or None
    return table


def _agreement(result: AgreementResult) -> Table:
    table = _scores("Judge and people", "labels")
    _row(table, "agreement", result.agreement)
    if result.without_ties is not None:
        _row(table, "  without ties", result.without_ties)
    if result.kappa is not None:
        _row(table, "Cohen's kappa", result.kappa)
    lines = [_bias_text(result.bias)]
    if result.people is not None:
        lines.insert(0, f"Two people agree on {result.people:.1%} of the pairs that several labelled.")
    if result.num_failures:
        lines.append(f"{result.num_failures} pairs have no verdict.")
    table.caption = "\n".join(lines)
    return table


def _scores(title: str, items: str) -> Table:
    table = score_table(title)
    table.min_width = _WIDTH
    table.add_column("", overflow="fold")
    for name in ("value", "SE", "95 % interval", items):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row(table: Table, name: str, score: Score) -> None:
    error = f"{score.standard_error:.2g}" if math.isfinite(score.standard_error) else "-"
    table.add_row(
        Text(name), number_text(score.value), error, interval_text(score, number_text), f"{score.num_items:,}"
    )


def _bias_text(bias: PositionBias) -> str:
    if not bias.num_pairs:
        return "All answers are the same."
    return (
        f"The judge says the same in both orders of {bias.consistent:.1%} of {bias.num_pairs:,} pairs;\nin "
        f"{bias.first:.1%} it prefers whichever stands first, in {bias.second:.1%} whichever stands second."
    )


def _rating(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "-" if math.isnan(value) else f"{'-' * (value < 0)}∞"
