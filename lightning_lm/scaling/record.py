"""One finished run as a ledger keeps it: everything that a later fit, in any convention, may ask for."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN, Curve, Points
from lightning_lm.scaling.flop_conventions import check_convention

__all__ = ["RunRecord", "curves_of", "points_of"]

_IDENTITY = ("name", "parameters", "tokens", "context_length", "hyper_parameters", "source")
"""Fields that identify a run. The rest (loss, seconds, versions) is its outcome."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, or one point of a run.

    Args:
        parameters: Known parameter counts of the model: ``total``, ``non_embedding``, ``embedding``, ``head``.
        flops_per_token: Training FLOPs by convention; see `lightning_lm.scaling.CONVENTIONS`.
        tokens: Trained on, repeated ones included.
        loss: Nats per token, of validation where there was one.
        unique_tokens: Different tokens among them; ``None`` where that is not known.
        context_length: Tokens of a row.
        curve: Tokens and loss along the run.
        wall_time_s: Seconds of training, evaluation left out.
        hyper_parameters: Plain data that tells this run from others: width, learning rate, batch size, seed, ...
        versions: Versions of Python and packages.
        name: Display name.
        source: Source of an imported run.
        finished: True if the run ended here; ``False`` for a point on its way.
        loss_name: Name of the loss: ``val/loss``, or ``train/loss`` if nothing was held out.
    """

    parameters: Mapping[str, float]
    flops_per_token: Mapping[str, float]
    tokens: int
    loss: float
    unique_tokens: int | None = None
    context_length: int | None = None
    curve: tuple[tuple[float, float], ...] = ()
    wall_time_s: float | None = None
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    source: str = ""
    finished: bool = True
    loss_name: str = ""

    def __post_init__(self) -> None:
        for name in ("tokens", "loss"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise DataError(f"A run with {name}={value} cannot be recorded; it must be finite and positive.")

    @property
    def id(self) -> str:
        """A hash of what makes this run this run: the same settings give the same id, whatever came out."""
        identity = {name: getattr(self, name) for name in _IDENTITY}
        text = json.dumps(identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def flops(self, convention: str) -> float:
        """Return the FLOPs of training in a convention.

        Args:
            convention: A key of `CONVENTIONS`.
        """
        return self.flops_per_token[convention] * self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with the id."""
        return {"id": self.id, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the record that `to_dict` described; what a newer version has added is passed over.

        Args:
            data: Plain data.

        Raises:
            DataError: If something needed is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in data.items() if name in known}
        missing = {"parameters", "flops_per_token", "tokens", "loss"} - set(fields)
        if missing:
            raise DataError(f"A run needs {', '.join(sorted(missing))} as well.")
        fields["curve"] = tuple((float(tokens), float(loss)) for tokens, loss in fields.get("curve", ()))
        return cls(**fields)


def points_of(records: Iterable[RunRecord], convention: str = "products", *, unfinished: bool = False) -> Points:
    """Return what a fit takes, sizes counted in one convention.

    Args:
        records: Records of a ledger.
        convention: A key of `CONVENTIONS`.
        unfinished: Use points on the way of a run too. Only those of a constant learning rate can be compared.

    Raises:
        DataError: If no run can be counted in this convention.
    """
    check_convention(convention)
    wanted = [record for record in records if unfinished or record.finished]
    usable = [record for record in wanted if convention in record.flops_per_token]
    if not usable:
        known = sorted({name for record in wanted for name in record.flops_per_token})
        raise DataError(
            f"Of {len(wanted)} finished runs none can be counted as {convention!r}. Known for them: {', '.join(known)}"
            "; choose one of these as the convention."
            if known
            else "The ledger holds no finished run: train with ScalingLaw, or take in a table with "
            "`lightning-lm scaling import`, first."
        )
    unique = [record.unique_tokens for record in usable]
    return Points.of(
        [record.flops_per_token[convention] / FLOPS_PER_PARAMETER_TOKEN for record in usable],
        [record.tokens for record in usable],
        [record.loss for record in usable],
        unique_tokens=None if None in unique else np.array(unique, dtype=float),
    )


def curves_of(records: Iterable[RunRecord], convention: str = "products") -> list[Curve]:
    """Return the loss curves of runs that have one.

    Args:
        records: Records of a ledger.
        convention: In which sizes are counted.
    """
    check_convention(convention)
    return [
        Curve(
            parameters=record.flops_per_token[convention] / FLOPS_PER_PARAMETER_TOKEN,
            tokens=np.array([tokens for tokens, _ in record.curve]),
            loss=np.array([loss for _, loss in record.curve]),
            name=record.name,
        )
        for record in records
        if record.finished and len(record.curve) > 1 and convention in record.flops_per_token
    ]
