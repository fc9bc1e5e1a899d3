"""Settings beside each other: the loss of each value of one setting, over repeated runs.

Runs with the same seed are paired: the loss of a seed with one value less that with the first value has a smaller
scatter than the two losses, whose seeds differ.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.fit import Estimate
from lightning_lm.scaling.ledger import RunRecord
from lightning_lm.scaling.lr_transfer import student_95

__all__ = ["SettingResult", "compare_settings"]

_SEED = "seed_everything"


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """Runs with one value of the setting that is compared.

    Args:
        value: The value, as text.
        losses: Loss of each run by its other settings, such as the seed. Nats per token.
        mean: Mean of the losses with Student's 95 % interval.
        change: Mean of the differences to the first value, over the runs whose other settings are the same, with
            Student's interval; ``None`` for the first.
    """

    value: str
    losses: Mapping[str, float]
    mean: Estimate
    change: Estimate | None


def compare_settings(records: Sequence[RunRecord], key: str | None = None) -> list[SettingResult]:
    """Return the results of each value of a setting, in the order in which the ledger has them first.

    Args:
        records: Records of a ledger.
        key: Name of the setting among the hyper-parameters; ``None`` for the only one that varies beside the seed.

    Raises:
        DataError: If no setting or several vary, or the named one does not.
    """
    finished = [record for record in records if record.finished]
    name = _varied(finished, key)
    losses: dict[str, dict[str, float]] = {}
    for record in finished:
        if name in record.hyper_parameters:
            others = {other: value for other, value in record.hyper_parameters.items() if other != name}
            runs = losses.setdefault(_text(record.hyper_parameters[name]), {})
            runs[json.dumps(others, sort_keys=True, default=str)] = record.loss
    first = next(iter(losses.values()))
    return [
        SettingResult(
            value=value,
            losses=runs,
            mean=_mean(list(runs.values())),
            change=None if runs is first else _mean([runs[one] - first[one] for one in runs if one in first]),
        )
        for value, runs in losses.items()
    ]


def _varied(records: Sequence[RunRecord], key: str | None) -> str:
    values: dict[str, set[str]] = {}
    for record in records:
        for name, value in record.hyper_parameters.items():
            values.setdefault(name, set()).add(_text(value))
    varied = sorted(name for name, found in values.items() if len(found) > 1 and name != _SEED)
    if key is not None and key in values:
        return key
    if key is not None or len(varied) != 1:
        named = f"no run has the setting {key!r}" if key else f"{len(varied)} settings vary, and one is compared"
        raise DataError(f"{named.capitalize()}. Name one with --setting: {', '.join(varied) or 'none varies here'}.")
    return varied[0]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _mean(values: Sequence[float]) -> Estimate:
    if len(values) < 2:
        return Estimate(values[0] if values else math.nan, math.nan, math.nan)
    mean = float(np.mean(values))
    half = student_95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)
