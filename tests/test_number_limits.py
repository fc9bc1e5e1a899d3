"""Numbers out of range are refused when a part or callback is made: none of them trains, or fails at the first step."""

import contextlib
import dataclasses
import importlib
import inspect
import math
import typing

import pytest

from lightning_lm import callbacks
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional import KLPenalty, Sigmoid
from lightning_lm.models import Adapters, Attention, TransformerConfig
from lightning_lm.modules import CrossEntropy
from lightning_lm.optim import SGD, WSD, AdamW, Cosine, Muon
from lightning_lm.parts import Limit, Part, check_numbers

SIGNED = {"threshold", "target_margin", "presence_penalty", "frequency_penalty", "scale", "embed_scale", "offset"}
SIGNED |= {"entropy_coefficient", "importance_cap", "seed", "lowest"}
"""Names of numbers that may be negative, or have no end."""
PACKAGES = ("data", "datamodules", "functional", "generation", "models", "modules", "optim", "rewards", "tokenizers")


def float_fields() -> list[tuple[type[Part], str]]:
    """Return the float fields of every part of the packages that training uses, if a part can be made of defaults."""
    for name in PACKAGES:
        importlib.import_module(f"lightning_lm.{name}")
    found = []
    for cls in sorted(Part.registry.values(), key=lambda cls: cls.__qualname__):
        ours = cls.__module__.startswith(tuple(f"lightning_lm.{name}." for name in PACKAGES))
        required = [field for field in dataclasses.fields(cls) if _is_required(field)]
        if ours and not required and not inspect.isabstract(cls):
            hints = typing.get_type_hints(cls)
            found += [(cls, name) for name, hint in hints.items() if hint in (float, float | None)]
    return [(cls, name) for cls, name in found if name not in SIGNED]


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_no_part_takes_a_float_that_makes_no_sense(wrong):
    fields = float_fields()
    assert (AdamW, "lr") in fields
    assert (CrossEntropy, "z_loss") in fields
    taken = []
    for cls, name in fields:
        with contextlib.suppress(ConfigurationError):
            cls(**{name: wrong})
            taken.append(f"{cls.__name__}.{name}")
    assert taken == []


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (AdamW, {"lr": -1}),
        (AdamW, {"betas": (0.9, 1.0)}),
        (SGD, {"momentum": -0.1}),
        (Muon, {"steps": 0}),
        (Muon, {"momentum": 1.5}),
        (Cosine, {"warmup": -1}),
        (WSD, {"horizon_tokens": 0}),
        (CrossEntropy, {"label_smoothing": 1.0}),
        (Sigmoid, {"beta": 0.0}),
        (KLPenalty, {"coefficient": -0.1}),
        (Attention, {"num_heads": 0}),
        (Adapters, {"rank": 0}),
        (TransformerConfig, {"context_length": 0, "d_model": 16, "num_layers": 1}),
        (callbacks.SampleText, {"max_new_tokens": 0}),
        (callbacks.Profile, {"steps": 0}),
        (callbacks.Throughput, {"peak_flops_per_s": 0}),
        (callbacks.LossSpike, {"deviations": math.nan}),
        (callbacks.MemoryReport, {"capacity_gib": -1}),
        (callbacks.CompressionReport, {"max_bytes": 0}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else next(iter(value)),
)
def test_the_error_names_the_number_and_its_range(part, settings):
    name = next(iter(settings))
    limits = "|".join(limit.value for limit in Limit)
    with pytest.raises(ConfigurationError, match=rf"^{name}=.* must be ({limits})\.$"):
        part(**settings)


def test_ends_of_the_ranges():
    assert AdamW(lr=0, betas=(0.0, 0.0), eps=0, weight_decay=0).lr == 0
    check_numbers({"x": Limit.COUNT, "y": Limit.FRACTION, "z": Limit.POSITIVE}, {"x": 1, "y": (0, 1.0), "z": None})
    with pytest.raises(ConfigurationError, match="x=1e-300 must be at least 1"):
        check_numbers({"x": Limit.COUNT}, {"x": 1e-300})


def test_a_users_part_inherits_and_adds_limits():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(SGD, limits={"extra": Limit.COUNT}):
        extra: int = 1

    Part.registry.pop("Mine")
    for settings in ({"extra": 0}, {"lr": -1}):
        with pytest.raises(ConfigurationError):
            Mine(**settings)
