"""Results of an evaluation: scores with intervals, and all that is needed to repeat and to compare them."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lightning_lm.errors import DataError
from lightning_lm.evals.compute_curve import compute_curve
from lightning_lm.evals.core import core_score
from lightning_lm.evals.statistics import (
    PairedDifference,
    Score,
    bootstrap_scores,
    normal_score,
    paired_difference,
    score_of,
)
from lightning_lm.evals.task import Task
from lightning_lm.storage import replacing
from lightning_lm.storage.json_text import parse_json

__all__ = ["ItemResult", "Overlap", "Results", "TaskResults", "compare_results", "plain_json", "scores_of_items"]

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ItemResult:
    """Scores of one item.

    Args:
        id: Name of the item.
        scores: Result of `Task.score`.
        subject: Part of the task that it belongs to; empty if there are none.
        cluster: Group of items that are not independent of each other.
        dropped_shots: Examples that did not fit into the context.
        is_truncated: True if the left of the question was cut.
    """

    id: str
    scores: Mapping[str, float]
    subject: str = ""
    cluster: str | None = None
    dropped_shots: int = 0
    is_truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Items of a task that occur in training documents, and the scores with and without them.

    Args:
        num_documents: Documents that were read.
        ngram: Words of an n-gram; an item with a shared one is contaminated.
        overlaps: Largest fraction of an item's n-grams in one document, by the id of the item.
        skipped: Ids of the items that have too few words to be looked for.
        scores: Scores by metric, of the ``clean``, the ``contaminated`` and the ``unsearched`` items.
    """

    num_documents: int
    ngram: int
    overlaps: Mapping[str, float]
    skipped: Sequence[str]
    scores: Mapping[str, Mapping[str, Score]]


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """Scores of a task.

    Args:
        name: Name of the task.
        main_metric: Name of the metric that stands for the task.
        chance: Value of the main metric for random answers.
        scores: Score by metric.
        subjects: Scores of each subject, if there are several.
        items: Scores of each item.
        fingerprint: SHA-256 of the task's settings, items and prompts.
        settings: Settings of the task.
        first_prompt: First request as the model was given it.
        contamination: Overlap with training documents, if it was looked for.
    """

    name: str
    main_metric: str
    chance: float
    scores: Mapping[str, Score]
    subjects: Mapping[str, Mapping[str, Score]]
    items: Sequence[ItemResult]
    fingerprint: str
    settings: Mapping[str, Any]
    first_prompt: str
    contamination: Overlap | None = None

    @property
    def main(self) -> Score:
        """Score of the main metric."""
        return self.scores[self.main_metric]

    @property
    def summary(self) -> dict[str, Any]:
        """Plain data for a ledger of runs: main metric, chance, items, and each metric with its standard error."""
        errors = {metric: score.standard_error for metric, score in self.scores.items()}
        return {
            "metric": self.main_metric,
            "chance": self.chance,
            "num_items": len(self.items),
            "scores": {metric: score.value for metric, score in self.scores.items() if math.isfinite(score.value)},
            "errors": {metric: error for metric, error in errors.items() if math.isfinite(error)},
        }

    @property
    def num_dropped(self) -> int:
        """Number of items whose examples did not all fit into the context."""
        return sum(item.dropped_shots > 0 for item in self.items)

    @property
    def num_truncated(self) -> int:
        """Number of items whose question was cut."""
        return sum(item.is_truncated for item in self.items)


@dataclasses.dataclass(frozen=True)
class Results:
    """Scores of a model on several tasks, written and read as JSON.

    Args:
        tasks: Results of each task.
        model: Description of the model: checkpoint and its digest, tokenizer.
        settings: Settings of the evaluation: seed, limit.
        versions: Versions of the packages.
        duration_s: Time it took. Seconds.
    """

    tasks: Sequence[TaskResults]
    model: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    duration_s: float = 0.0

    def __getitem__(self, name: str) -> TaskResults:
        """Return the results of the task of this name."""
        return next(task for task in self.tasks if task.name == name)

    @property
    def core(self) -> Score | None:
        """Mean of the accuracies centred on chance (CORE), of the tasks whose main metric is one; ``None`` below two.

        Its error is that of independent tasks.
        """
        tasks = [task for task in self.tasks if 0 <= task.chance < 1 and 0 <= task.main.value <= 1]
        if len(tasks) < 2:
            return None
        value = core_score({task.name: task.main.value for task in tasks}, {task.name: task.chance for task in tasks})
        errors = [task.main.standard_error / (1 - task.chance) for task in tasks]
        return normal_score(value, math.sqrt(math.fsum(error**2 for error in errors)) / len(tasks), len(tasks))

    def save(self, path: Path | str) -> None:
        """Write the results as JSON, as a whole or not at all.

        Args:
            path: File to write.
        """
        derived = {
            "core": None if self.core is None else dataclasses.asdict(self.core),
            "curve": [dataclasses.asdict(point) for point in compute_curve(self.tasks)],
        }
        content = {"format": _FORMAT, **plain_json({**derived, **dataclasses.asdict(self)})}
        with replacing(Path(path)) as file:
            file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` has written.

        Args:
            path: File to read.

        Raises:
            DataError: If the file is no such result.
            OSError: If it cannot be read.
        """
        try:
            content: Any = parse_json(Path(path).read_text(encoding="utf-8"))
            tasks = [_task_from(task) for task in content["tasks"]]
            return cls(tasks, content["model"], content["settings"], content["versions"], content["duration_s"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no result of `lightning-lm evaluate --output`: {type(error).__name__}: {error}."
            ) from error


def scores_of_items(task: Task, items: Sequence[ItemResult]) -> dict[str, Score]:
    """Return the scores of a task over items: closed-form errors for means, those of a bootstrap for other scores.

    Args:
        task: Its ``aggregate`` makes one number of those of the items.
        items: Scores of each item, of all or some items.
    """
    aggregated = task.aggregate([item.scores for item in items])
    found = {}
    for metric, value in aggregated.items():
        having = [item for item in items if metric in item.scores]
        if having and math.isclose(value, math.fsum(item.scores[metric] for item in having) / len(having)):
            is_fraction = False if metric in task.numbers else None
            found[metric] = score_of(
                [item.scores[metric] for item in having], _clusters(having), is_fraction=is_fraction
            )
    if len(found) < len(aggregated):
        drawn = bootstrap_scores(
            lambda indices: task.aggregate([items[index].scores for index in indices]), len(items), _clusters(items)
        )
        found.update({metric: score for metric, score in drawn.items() if metric not in found})
    return found


def compare_results(first: Results, second: Results) -> dict[str, dict[str, PairedDifference]]:
    """Return the differences of two models' scores, first minus second, by task and metric, over the common items.

    Metrics that are no means over items are left out.

    Args:
        first: Results of a model.
        second: Results of another, on tasks of the same names.

    Raises:
        DataError: If no task is in both, or one has other items or prompts in the second.
    """
    names = [task.name for task in first.tasks if task.name in {other.name for other in second.tasks}]
    if not names:
        raise DataError(
            f"No task is in both results: the first has {', '.join(task.name for task in first.tasks)}, the second "
            f"{', '.join(task.name for task in second.tasks)}. Evaluate both models on the same tasks."
        )
    return {name: _compare_task(first[name], second[name]) for name in names}


def _compare_task(first: TaskResults, second: TaskResults) -> dict[str, PairedDifference]:
    if first.fingerprint != second.fingerprint:
        raise DataError(
            f"The two results of {first.name} are of different items or prompts ({first.fingerprint[:12]} and "
            f"{second.fingerprint[:12]}). Evaluate both with the same data, shots and limit."
        )
    others = {item.id: item for item in second.items}
    found = {}
    for metric, score in first.scores.items():
        pairs = [
            (item, others[item.id])
            for item in first.items
            if item.id in others and metric in item.scores and metric in others[item.id].scores
        ]
        mine = [item.scores[metric] for item, _ in pairs]
        if pairs and math.isclose(math.fsum(mine) / len(mine), score.value, abs_tol=1e-12):
            theirs = [other.scores[metric] for _, other in pairs]
            found[metric] = paired_difference(mine, theirs, _clusters([item for item, _ in pairs]))
    return found


def _clusters(items: Iterable[ItemResult]) -> list[str] | None:
    names = [item.id if item.cluster is None else f"cluster {item.cluster}" for item in items]
    return None if len(set(names)) == len(names) else names


def plain_json(value: Any) -> Any:
    """Return JSON data; numbers that JSON has not become ``null``.

    Args:
        value: Mappings, sequences and what JSON knows.
    """
    if isinstance(value, Mapping):
        return {key: plain_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _task_from(content: dict[str, Any]) -> TaskResults:
    scores = _scores_from(content["scores"])
    subjects = {name: _scores_from(of_subject) for name, of_subject in content["subjects"].items()}
    items = [ItemResult(**{**item, "scores": _numbers(item["scores"])}) for item in content["items"]]
    overlap = content.get("contamination")
    if overlap is not None:
        parts = {part: _scores_from(of_part) for part, of_part in overlap["scores"].items()}
        overlap = Overlap(**{**overlap, "scores": parts})
    found = {"scores": scores, "subjects": subjects, "items": items, "contamination": overlap}
    return TaskResults(**{**content, **found})


def _scores_from(content: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    return {metric: Score(**_numbers(score)) for metric, score in content.items()}


def _numbers(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in content.items()}
