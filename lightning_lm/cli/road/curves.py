"""Curves of a run, read from the event files that TensorBoard would show."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

__all__ = ["Curve", "Run", "read_run"]


class Curve(NamedTuple):
    """Values of one name.

    Args:
        steps: Optimizer steps.
        values: Values, as many.
    """

    steps: Sequence[int]
    values: Sequence[float]


class Run(NamedTuple):
    """A run of ``fit``.

    Args:
        curves: Curves by logged name.
        num_tokens: Tokens that it read; ``None`` if that is not known.
    """

    curves: Mapping[str, Curve]
    num_tokens: int | None


def read_run(folder: Path) -> Run:
    """Read the folder of a run; of steps that were run twice, after a kill, the later values count.

    Args:
        folder: ``version_N`` of a run.
    """
    curves = _curves(folder)
    return Run(curves, _num_tokens(folder, curves))


def _curves(folder: Path) -> dict[str, Curve]:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for name in events.Tags()["scalars"]:
        values = {event.step: event.value for event in events.Scalars(name)}
        curves[name] = Curve(sorted(values), [values[step] for step in sorted(values)])
    return curves


def _num_tokens(folder: Path, curves: Mapping[str, Curve]) -> int | None:
    """Return the counted tokens, or for packed rows steps x rows x length."""
    counted = curves.get("train/num_tokens")
    if counted is not None:
        return int(counted.values[-1])
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        data: Mapping[str, Any] = config["data"]["init_args"]
        return int(config["trainer"]["max_steps"]) * int(data["batch_size"]) * int(data["context_length"])
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        targets = curves.get("train/tokens")
        return None if targets is None else int(targets.values[-1])
