"""The report as data: what came, what each step removed and why, and what is left."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lm.curation.execution.statistics import Tally
from lightning_lm.curation.step import Bounds, Filter
from lightning_lm.errors import DataError
from lightning_lm.parts import Part
from lightning_lm.storage import check_digests
from lightning_lm.storage.json_text import parse_json

__all__ = ["NAME", "Histogram", "Report", "StepReport"]

NAME = "report.json"
_BINS = 30
_LOG_RATIO = 50.0
"""Ratio of the largest to the smallest value beyond which a histogram has a logarithmic axis."""


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Distribution of a measured quantity over the documents that a step saw.

    Args:
        counts: Sampled documents by bin.
        edges: Edges of the bins, one more than bins.
        median: Median of the sample.
        minimum: Lower limit of the step, if it has one.
        maximum: Upper limit of the step, if it has one.
        is_log: True if the bins are equally wide in the logarithm.
    """

    counts: Sequence[int]
    edges: Sequence[float]
    median: float
    minimum: float | None = None
    maximum: float | None = None
    is_log: bool = False


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Report of one step.

    Args:
        name: Name of the step.
        settings: Its settings.
        documents_in: Documents that came.
        documents_out: Documents that were kept.
        bytes_in: Their text, UTF-8 bytes.
        bytes_out: Text that was kept, bytes.
        changed: Kept documents whose text changed.
        reasons: Removed documents by rule.
        reason_bytes: Their text by rule, bytes.
        counts: Sums of numbers that the step counted, such as masks by kind.
        histograms: Distributions by measured quantity.
        removed: Samples of removed documents by rule.
        kept: Samples of kept documents.
    """

    name: str
    settings: Mapping[str, Any]
    documents_in: int
    documents_out: int
    bytes_in: int
    bytes_out: int
    changed: int
    reasons: Mapping[str, int]
    reason_bytes: Mapping[str, int]
    counts: Mapping[str, int]
    histograms: Mapping[str, Histogram]
    removed: Mapping[str, Sequence[Mapping[str, Any]]]
    kept: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, name: str, step: Any, tally: Tally) -> "StepReport":
        """Return the report of a step from its tally.

        Args:
            name: Name of the step.
            step: The step.
            tally: Its counts and samples.
        """
        bounds = step.bounds() if isinstance(step, Filter) else {}
        return cls(
            name=name,
            settings=step.to_dict() if isinstance(step, Part) else {},
            documents_in=tally.documents_in,
            documents_out=tally.documents_out,
            bytes_in=tally.bytes_in,
            bytes_out=tally.bytes_out,
            changed=tally.changed,
            reasons=dict(sorted(tally.reasons.items(), key=lambda item: (-item[1], item[0]))),
            reason_bytes=dict(sorted(tally.reason_bytes.items())),
            counts=dict(sorted(tally.counts.items())),
            histograms=_histograms([values for _, values in tally.values.items()], bounds),
            removed={rule: [{"id": key, **item} for key, item in samples.items()] for rule, samples in _sorted(tally)},
            kept=[{"id": key, **item} for key, item in tally.kept.items()],
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """Report of a run.

    Args:
        folder: Folder of the output.
        documents_read: Documents that were read.
        bytes_read: Their text, or markup, UTF-8 bytes.
        documents_kept: Documents of the output.
        bytes_kept: Their text, UTF-8 bytes.
        steps: Reports of the steps, in their order.
        unreadable: Records without a document by reason.
        examples: Some of them by reason: place and detail.
        files: Names of the output's files.
    """

    folder: Path
    documents_read: int
    bytes_read: int
    documents_kept: int
    bytes_kept: int
    steps: Sequence[StepReport]
    unreadable: Mapping[str, int]
    examples: Mapping[str, Sequence[Sequence[str]]]
    files: Sequence[str]

    def to_json(self) -> str:
        """Return the report as JSON."""
        plain = dataclasses.asdict(self)
        del plain["folder"]
        return json.dumps(plain, indent=1, ensure_ascii=False, default=str) + "\n"

    @classmethod
    def read(cls, folder: Path | str) -> "Report":
        """Return the report of an output.

        Args:
            folder: Folder of the output.

        Raises:
            CheckpointError: If it has changed since it was written.
            DataError: If it has none.
        """
        path = Path(folder) / NAME
        check_digests(Path(folder), [NAME])
        try:
            plain = parse_json(path.read_text(encoding="utf-8"))
            steps = [
                StepReport(**{**step, "histograms": {name: Histogram(**h) for name, h in step["histograms"].items()}})
                for step in plain["steps"]
            ]
            return cls(**{**plain, "folder": Path(folder), "steps": steps})
        except (OSError, ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is no report of a curated corpus ({error}); curate it again.") from error


def _sorted(tally: Tally) -> list[tuple[str, Any]]:
    return sorted(tally.removed.items(), key=lambda item: (-tally.reasons[item[0]], item[0]))


def _histograms(samples: Sequence[Mapping[str, float]], bounds: Mapping[str, Bounds]) -> dict[str, Histogram]:
    names = dict.fromkeys([*bounds, *(name for values in samples for name in values)])
    found = {}
    for name in names:
        values = [float(sample[name]) for sample in samples if name in sample and math.isfinite(sample[name])]
        if values:
            found[name] = _histogram(np.array(values), bounds.get(name, Bounds()))
    return found


def _histogram(values: "np.ndarray[Any, np.dtype[np.float64]]", bounds: Bounds) -> Histogram:
    low, high = float(values.min()), float(values.max())
    positive = values[values > 0]
    is_log = low >= 0 and len(positive) > 0 and high / float(positive.min()) > _LOG_RATIO and high > 1
    if is_log:
        low = float(positive.min())
        edges = np.geomspace(low, high, _BINS + 1)
        values = np.maximum(values, low)
    else:
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    counts, edges = np.histogram(values, edges)
    return Histogram(
        counts=[int(count) for count in counts],
        edges=[float(f"{edge:.6g}") for edge in edges],
        median=float(f"{np.median(values):.6g}"),
        minimum=bounds.minimum,
        maximum=bounds.maximum,
        is_log=is_log,
    )
