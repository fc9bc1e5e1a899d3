"""Evaluation of a model on tasks: the loop that asks, scores, and keeps what it has when it is interrupted."""

import contextlib
import dataclasses
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_lm import __version__
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals.completing import complete
from lightning_lm.evals.journal import Journal
from lightning_lm.evals.requests import EvaluatedModel, Generation, Likelihood, Request
from lightning_lm.evals.results import ItemResult, Results, TaskResults, scores_of_items
from lightning_lm.evals.task import Answer, Item, Task

__all__ = [
    "answer_part",
    "chosen_items",
    "evaluate_tasks",
    "progress_bar",
    "results_of",
    "task_fingerprint",
    "versions",
]

_AT_ONCE = 256
_GENERATED_AT_ONCE = 64
"""Items between two entries of the journal."""
_VERSIONED = ("torch", "numpy", "transformers", "tokenizers")


def evaluate_tasks(
    tasks: Sequence[Task],
    model: EvaluatedModel,
    *,
    limit: int | None = None,
    seed: int = 0,
    output: Path | str | None = None,
    progress: bool = False,
) -> Results:
    """Ask a model the items of tasks and return the scores.

    What was asked is kept in a journal beside the output. A run that breaks off goes on there when it is repeated with
    the same model, tasks and settings, and gives the same results.

    Args:
        tasks: The tasks; their names must differ.
        model: The model.
        limit: Most items of a task, evenly spread over it; ``None`` for all.
        seed: Seed of sampled completions whose task sets none.
        output: File to write the results to, as JSON.
        progress: Show a progress bar on stderr.

    Raises:
        ConfigurationError: If two tasks have one name, or the limit is below 1.
        DataError: If a task's data are missing or do not fit, or a task has no items.
    """
    start = time.monotonic()
    chosen = chosen_items(tasks, limit)
    settings = {"seed": seed, "limit": limit}
    with contextlib.ExitStack() as stack:
        journal = None
        if output is not None:
            journal = stack.enter_context(
                Journal(Path(output), {"model": model.description, "versions": versions(), **settings})
            )
        advance = stack.enter_context(progress_bar(sum(len(items) for _, items in chosen), shown=progress))
        answered = [_answer_all(task, items, model, seed, journal, advance) for task, items in chosen]
        results = results_of(chosen, answered, model, settings=settings, duration_s=time.monotonic() - start)
        if output is not None and journal is not None:
            results.save(output)
            journal.remove()
    return results


def chosen_items(tasks: Sequence[Task], limit: int | None) -> list[tuple[Task, Sequence[Item]]]:
    """Return each task with the items to ask.

    Args:
        tasks: The tasks; their names must differ.
        limit: Most items of a task, evenly spread over it; ``None`` for all.

    Raises:
        ConfigurationError: If two tasks have one name, a task has no items, or the limit is below 1.
        DataError: If a task's data are missing or do not fit.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"Two tasks have one name ({', '.join(names)}); give one of them another name.")
    if limit is not None and limit < 1:
        raise ConfigurationError(f"limit={limit} must be at least 1, or None for all items.")
    return [(task, _limited(task, limit)) for task in tasks]


def answer_part(
    chosen: Sequence[tuple[Task, Sequence[Item]]],
    model: EvaluatedModel,
    *,
    seed: int = 0,
    part: int = 0,
    parts: int = 1,
) -> list[list[ItemResult]]:
    """Return the scores of a consecutive part of each task's items: those of one of several ranks.

    Args:
        chosen: Result of `chosen_items`.
        model: The model.
        seed: Seed of sampled completions whose task sets none.
        part: Index of the part.
        parts: Number of parts, which together have all items in order.
    """
    found = []
    for task, items in chosen:
        first, end = (len(items) * border // parts for border in (part, part + 1))
        found.append(_answer_all(task, items[first:end], model, seed))
    return found


def results_of(
    chosen: Sequence[tuple[Task, Sequence[Item]]],
    answered: Sequence[list[ItemResult]],
    model: EvaluatedModel,
    *,
    settings: Mapping[str, Any],
    duration_s: float,
) -> Results:
    """Return the results of tasks whose items are all scored.

    Args:
        chosen: Result of `chosen_items`.
        answered: Scores of the items of each task.
        model: The model that was asked.
        settings: Settings of the evaluation.
        duration_s: Time it took. Seconds.
    """
    found = [_summary(task, items, own, model) for (task, items), own in zip(chosen, answered, strict=True)]
    return Results(found, model.description, settings, versions(), duration_s)


def task_fingerprint(task: Task, items: Sequence[Item]) -> str:
    """Return the SHA-256 of a task's settings and of all that is asked: equal if a result can be compared.

    Args:
        task: The task.
        items: The items that are asked.
    """
    settings = {name: value for name, value in task.to_dict().items() if name != "data"}  # a folder may move
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    for item in items:
        digest.update(repr((item.id, item.requests, item.gold)).encode())
    return digest.hexdigest()


def _limited(task: Task, limit: int | None) -> Sequence[Item]:
    items = task.items()
    if not items:
        raise ConfigurationError(f"The task {task.name} has no items.")
    if limit is None or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


def _answer_all(
    task: Task,
    items: Sequence[Item],
    model: EvaluatedModel,
    seed: int,
    journal: Journal | None = None,
    advance: Callable[[str, int], None] | None = None,
) -> list[ItemResult]:
    fingerprint = task_fingerprint(task, items) if journal else ""
    generates = any(isinstance(request, Generation) for item in items[:1] for request in item.requests)
    size = _GENERATED_AT_ONCE if generates else _AT_ONCE
    results: list[ItemResult] = []
    for start in range(0, len(items), size):
        block = items[start : start + size]
        known = journal.recall(fingerprint, start, len(block)) if journal else None
        answered = known or _answer(task, block, model, seed)
        if journal and not known:
            journal.record(fingerprint, start, answered)
        results += answered
        if advance:
            advance(task.name, len(block))
    return results


def _summary(task: Task, items: Sequence[Item], results: list[ItemResult], model: EvaluatedModel) -> TaskResults:
    subjects = sorted({result.subject for result in results})
    of_subjects = {name: [result for result in results if result.subject == name] for name in subjects}
    shown: Any = getattr(model, "shown", None)
    return TaskResults(
        task.name,
        task.main_metric,
        task.chance,
        scores_of_items(task, results),
        {name: scores_of_items(task, of_subjects[name]) for name in subjects} if len(subjects) > 1 else {},
        results,
        task_fingerprint(task, items),
        task.to_dict(),
        "" if shown is None else shown(items[0].requests[0]),
    )


def _answer(task: Task, items: Sequence[Item], model: EvaluatedModel, seed: int) -> list[ItemResult]:
    requests = [_addressed(request, item, seed) for item in items for request in item.requests]
    scored = [place for place, request in enumerate(requests) if not isinstance(request, Generation)]
    written = [place for place, request in enumerate(requests) if isinstance(request, Generation)]
    answers: dict[int, Answer] = {}
    if scored:
        answers.update(zip(scored, model.log_likelihoods([requests[place] for place in scored]), strict=True))  # type: ignore[misc]
    if written:
        answers.update(zip(written, complete(model, [requests[place] for place in written]), strict=True))  # type: ignore[misc]
    results, place = [], 0
    for item in items:
        own = [answers[place + index] for index in range(len(item.requests))]
        place += len(own)
        results.append(
            ItemResult(
                item.id,
                dict(task.score(item, own)),
                item.subject,
                item.cluster,
                max((answer.dropped_shots for answer in own), default=0),
                any(answer.is_truncated for answer in own),
            )
        )
    return results


def _addressed(request: Request, item: Item, seed: int) -> Request:
    """Return a request that knows its item: draws depend on the item alone, not on those that are asked with it."""
    if isinstance(request, Likelihood):
        return dataclasses.replace(request, group=item.id)
    if not isinstance(request, Generation) or request.sampling.greedy:
        return request
    key = int.from_bytes(hashlib.sha256(item.id.encode("utf-8", "surrogatepass")).digest()[:7])
    given = request.sampling.seed
    sampling = dataclasses.replace(request.sampling, seed=seed if given is None else given)
    return dataclasses.replace(request, sampling=sampling, key=key)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that scores may depend on."""
    installed = {name: metadata.version(name) for name in _VERSIONED if name in sys.modules}
    return {"lightning_lm": __version__, "python": platform.python_version(), **installed}


@contextlib.contextmanager
def progress_bar(total: int, *, shown: bool) -> Iterator[Callable[[str, int], None]]:
    """Show progress on stderr; yields a function of a description and of a number of further items.

    Args:
        total: Items in all.
        shown: Show it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        job = bar.add_task("", total=total)
        yield lambda name, count: bar.update(job, advance=count, description=name)
