"""Rotary positions as ``config.json`` spells them, both ways."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.positions import LinearScaling, Llama3Scaling, Rope, RopeScaling, YaRNScaling

__all__ = ["positions_written", "read_rope", "write_layer_ropes", "write_rope"]

_Settings = Mapping[str, Any]


def read_rope(config: _Settings, *, kind_of_layer: str | None = None, partial: bool = False) -> Rope:
    """Return the rotary part that a ``config.json`` describes, in its old or its new spelling.

    Args:
        config: Has ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``.
        kind_of_layer: The layers to read for, where the settings differ between kinds of layers.
        partial: True if models of the family can rotate a fraction of a head.

    Raises:
        ConfigurationError: If the scaling is of a kind that has no part here.
    """
    settings: _Settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if kind_of_layer is not None and config.get("rope_parameters"):
        flat = any(value is not None and not isinstance(value, Mapping) for value in settings.values())
        if flat or not isinstance(settings.get(kind_of_layer), Mapping):
            raise ConfigurationError(
                f"rope_parameters is {dict(settings)}, and this family needs one object for each kind of layers. Write "
                "'rope_parameters': {'full_attention': {...}, 'sliding_attention': {...}} into config.json."
            )
        settings = settings[kind_of_layer]
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in _READERS or any(isinstance(value, Mapping) for value in settings.values()):
        raise ConfigurationError(
            f"Rotary positions {dict(settings)} are not known here; known kinds are {', '.join(_READERS)}, the same "
            "in every layer."
        )
    fraction = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    fraction = 1.0 if fraction is None else float(fraction)
    if fraction != 1 and not partial:
        raise ConfigurationError(f"partial_rotary_factor={fraction} is not known in this family; only 1.0 is.")
    base = settings.get("rope_theta", config.get("rope_theta"))
    original = settings.get("original_max_position_embeddings", config["max_position_embeddings"])
    if kind_of_layer is None:  # as transformers has it, and only there
        original = config.get("original_max_position_embeddings") or original
    scaling = _READERS[kind](settings, int(original), int(config["max_position_embeddings"]))
    return Rope(base=10_000.0 if base is None else float(base), fraction=fraction, scaling=scaling)


def write_rope(rope: Rope) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling``, which every release of ``transformers`` reads.

    Raises:
        ConfigurationError: If the scaling has no name in ``transformers``.
    """
    write = _WRITERS.get(type(rope.scaling))
    if write is None:
        raise ConfigurationError(
            f"{rope.scaling} has no counterpart in transformers; use one of its scalings, or none."
        )
    return {"rope_theta": rope.base, "rope_scaling": write(rope.scaling)}


def write_layer_ropes(ropes: Mapping[str, Rope | None]) -> dict[str, Any]:
    """Return ``rope_parameters`` of a family whose settings differ between kinds of layers.

    Args:
        ropes: Rotary part of each kind of layers.

    Raises:
        ConfigurationError: If a kind has none, or its scaling has no name in ``transformers``.
    """
    settings = {}
    for kind, rope in ropes.items():
        if rope is None:
            raise ConfigurationError("there are layers without rotary positions")
        written = write_rope(rope)
        scaling = written["rope_scaling"] or {"rope_type": "default"}
        settings[kind] = {**scaling, "rope_theta": written["rope_theta"]}
    return settings


def positions_written(context_length: int, scaling: RopeScaling | None) -> int:
    """Return the ``max_position_embeddings`` to write beside a scaling.

    That is the context length, unless ``transformers`` would warn that it contradicts the scaling; then it is the
    length that the scaling was made for. Rotary positions do not depend on it.
    """
    match scaling:
        case YaRNScaling(factor=factor, original_context_length=original):
            fits = context_length in (original, original * factor)
        case Llama3Scaling(factor=factor, original_context_length=original):
            fits = context_length > original
        case _:
            return context_length
    return context_length if fits else int(original * factor)


def _read_linear(settings: _Settings, original: int, longest: int) -> RopeScaling:  # noqa: ARG001
    return LinearScaling(factor=float(settings["factor"]))


def _read_llama3(settings: _Settings, original: int, longest: int) -> RopeScaling:  # noqa: ARG001
    return Llama3Scaling(
        factor=float(settings["factor"]),
        low_freq_factor=float(settings["low_freq_factor"]),
        high_freq_factor=float(settings["high_freq_factor"]),
        original_context_length=original,
    )


def _read_yarn(settings: _Settings, original: int, longest: int) -> RopeScaling:
    factor = settings.get("factor")
    factor = longest / original if factor is None else float(factor)
    return YaRNScaling(
        factor=factor,
        original_context_length=original,
        beta_fast=float(settings.get("beta_fast") or 32.0),
        beta_slow=float(settings.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention_factor(settings, factor),
        truncate=bool(settings.get("truncate", True)),
    )


def _yarn_attention_factor(settings: _Settings, factor: float) -> float | None:
    """Return the multiplier of cosines and sines where it is not the paper's; DeepSeek gives it as a quotient."""
    given, above, below = (settings.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    if above and below:
        log_factor = math.log(factor) if factor > 1 else 0.0
        return float((0.1 * above * log_factor + 1.0) / (0.1 * below * log_factor + 1.0))
    return None


def _write_llama3(scaling: Any) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context_length,
    }


def _write_yarn(scaling: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    if scaling.attention_factor is not None:
        settings["attention_factor"] = scaling.attention_factor
    return settings if scaling.truncate else {**settings, "truncate": False}


_READERS: dict[str, Callable[[_Settings, int, int], RopeScaling | None]] = {
    "default": lambda *_: None,
    "linear": _read_linear,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}
_WRITERS: dict[type, Callable[[Any], dict[str, Any] | None]] = {
    type(None): lambda _: None,
    LinearScaling: lambda scaling: {"rope_type": "linear", "factor": scaling.factor},
    Llama3Scaling: _write_llama3,
    YaRNScaling: _write_yarn,
}
