"""Scores and samples of one checkpoint: the validations and tasks that a road asks for, and its prompts continued.

Run in a process of its own, ``python -m lightning_lm.cli.road.measure JOB.json``, after each stage of training.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lm.cli import evaluate
from lightning_lm.cli.trainer import CommandLine, prepare
from lightning_lm.errors import LightningLMError, UsageError
from lightning_lm.evals.local_model import LocalModel
from lightning_lm.evals.runner import evaluate_tasks
from lightning_lm.generation import Generator, Sampling
from lightning_lm.modules import load_model
from lightning_lm.storage import replacing
from lightning_lm.storage.json_text import parse_json

__all__ = ["Job", "measure"]

_MAX_NEW_TOKENS = 40
_FAILURE = 1
_Command = tuple[Sequence[str], Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Measurements of one checkpoint.

    Args:
        result: File that is written.
        checkpoint: Checkpoint; ``None`` for the untrained model of the first command.
        commands: Words after ``lightning-lm`` of a validation or an evaluation, and the names of its metrics, by name
            of the score.
        prompts: Texts to continue.
        temperature: Sampling temperature of the samples.
    """

    result: str
    checkpoint: str | None
    commands: Mapping[str, _Command]
    prompts: Sequence[str]
    temperature: float


class _Measured(CommandLine):
    """The command line of ``validate`` that keeps what it measured."""

    metrics: Mapping[str, float] = {}

    def _measure(self, verb: Any, arguments: dict[str, Any]) -> None:
        results = verb(**{**arguments, "verbose": False})
        self.metrics = {name: float(value) for result in results for name, value in result.items()}


def measure(job: Job) -> None:
    """Measure, and write the result as JSON: ``scores`` and ``samples``.

    Args:
        job: Measurements.

    Raises:
        LightningLMError: If a metric is not logged by the validation that is to have it.
    """
    prepare()
    scores: dict[str, dict[str, float]] = {}
    built = None
    for name, (words, metrics) in _validations_first(job.commands):
        if words[0] == "evaluate":
            found = _task_scores(words, job, built)
        else:
            built = _Measured(words[0], words[1:])
            found = built.metrics
        scores[name] = {metric: _metric(metric, found, words) for metric in metrics}
    samples = _samples(job, built) if job.prompts else []
    with replacing(Path(job.result)) as file:
        file.write(json.dumps({"scores": scores, "samples": samples}, indent=1).encode())


def _validations_first(commands: Mapping[str, _Command]) -> list[tuple[str, _Command]]:
    """Return the commands so that a validation has built an untrained model before tasks ask it."""
    return sorted(commands.items(), key=lambda item: item[1][0][0] == "evaluate")


def _task_scores(words: Sequence[str], job: Job, built: _Measured | None) -> Mapping[str, float]:
    """Return the scores of an evaluation as ``TASK/METRIC``."""
    parser = argparse.ArgumentParser(prog="lightning-lm evaluate", exit_on_error=False)
    evaluate.add_arguments(parser)
    try:
        namespace = parser.parse_args(words[1:])
    except argparse.ArgumentError as error:
        raise UsageError(f"{shlex.join(['lightning-lm', *words])}: {error}. Change command: of the score.") from error
    model, tokenizer = _model(job, built)
    if tokenizer is None:
        return {}
    asked = LocalModel(
        model, tokenizer, batch_size=namespace.batch_size, max_length=namespace.max_length, chat=namespace.chat
    )
    results = evaluate_tasks(evaluate.asked_tasks(namespace), asked, limit=namespace.limit, seed=namespace.seed)
    return {f"{task.name}/{metric}": score.value for task in results.tasks for metric, score in task.scores.items()}


def _metric(name: str, metrics: Mapping[str, float], words: Sequence[str]) -> float:
    if name not in metrics:
        raise LightningLMError(
            f"lightning-lm {' '.join(words)} logs no {name}; it logs {', '.join(metrics) or 'nothing'}. Name one of "
            "these under scores: of the road."
        )
    return metrics[name]


def _samples(job: Job, built: _Measured | None) -> list[str]:
    """Return one continuation of each prompt."""
    model, tokenizer = _model(job, built)
    if tokenizer is None:
        return []
    sampling = Sampling(temperature=job.temperature, seed=0)
    completions = Generator(model, tokenizer).generate(
        list(job.prompts), sampling=sampling, max_new_tokens=_MAX_NEW_TOKENS
    )
    return [completion.text for completion in completions]


def _model(job: Job, built: _Measured | None) -> tuple[Any, Any]:
    """Return the model and its tokenizer: of the checkpoint, or untrained as a validation has built it."""
    if job.checkpoint is not None:
        return load_model(job.checkpoint)
    return (None, None) if built is None else (built.model.model, built.datamodule.tokenizer)


def main(path: str) -> int:
    """Measure a job from a file; return the exit status.

    Args:
        path: JSON file of a `Job`.
    """
    try:
        measure(Job(**parse_json(Path(path).read_text(encoding="utf-8"))))
    except LightningLMError as error:
        print(f"Error ({type(error).__name__}): {error}", file=sys.stderr)
        return _FAILURE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
