"""Scores and samples of one checkpoint: the validations that a road asks for, and its prompts continued.

Run in a process of its own, ``python -m lightning_lm.cli.road.measure JOB.json``, after each stage of training.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lm.cli.trainer import CommandLine, prepare
from lightning_lm.errors import LightningLMError
from lightning_lm.generation import Generator, Sampling
from lightning_lm.modules import load_model
from lightning_lm.storage import replacing
from lightning_lm.storage.json_text import parse_json

__all__ = ["Job", "measure"]

_MAX_NEW_TOKENS = 40
_FAILURE = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Measurements of one checkpoint.

    Args:
        result: File that is written.
        checkpoint: Checkpoint; ``None`` for the untrained model of the first command.
        commands: Words after ``lightning-lm`` of a validation, and the names of its metrics, by name of the score.
        prompts: Texts to continue.
        temperature: Sampling temperature of the samples.
    """

    result: str
    checkpoint: str | None
    commands: Mapping[str, tuple[Sequence[str], Sequence[str]]]
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
    for name, (words, metrics) in job.commands.items():
        built = _Measured(words[0], words[1:])
        scores[name] = {metric: _metric(metric, built.metrics, words) for metric in metrics}
    samples = _samples(job, built) if job.prompts else []
    with replacing(Path(job.result)) as file:
        file.write(json.dumps({"scores": scores, "samples": samples}, indent=1).encode())


def _metric(name: str, metrics: Mapping[str, float], words: Sequence[str]) -> float:
    if name not in metrics:
        raise LightningLMError(
            f"lightning-lm {' '.join(words)} logs no {name}; it logs {', '.join(metrics) or 'nothing'}. Name one of "
            "these under scores: of the road."
        )
    return metrics[name]


def _samples(job: Job, built: _Measured | None) -> list[str]:
    """Return one continuation of each prompt."""
    if job.checkpoint is not None:
        model, tokenizer = load_model(job.checkpoint)
    elif built is not None:
        model, tokenizer = built.model.model, built.datamodule.tokenizer
    else:
        return []
    if tokenizer is None:
        return []
    sampling = Sampling(temperature=job.temperature, seed=0)
    completions = Generator(model, tokenizer).generate(
        list(job.prompts), sampling=sampling, max_new_tokens=_MAX_NEW_TOKENS
    )
    return [completion.text for completion in completions]


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
