"""Numbers out of range are refused when a part or callback is made: none of them trains, or fails at the first step."""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lm import callbacks, cli, datamodules, modules, strategies
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.functional import KLPenalty, Sigmoid
from lightning_lm.json_http import JSONServer
from lightning_lm.models import Adapters, Attention, Layer, TransformerConfig, decoder_layers
from lightning_lm.modules import CrossEntropy
from lightning_lm.optim import SGD, WSD, AdamW, Cosine, Muon
from lightning_lm.parts import Limit, Part, check_numbers
from lightning_lm.scaling import DropSmallestBudgets, Estimator, IsoFlop, RandomSearch

SIGNED = {"threshold", "target_margin", "presence_penalty", "frequency_penalty", "scale", "embed_scale", "offset"}
SIGNED |= {
    "forget_bias",
    "output_scale",
    "residual_scale",
    "entropy_coefficient",
    "seed",
    "lowest",
    "reward_weights",
    "weights",
}
"""Names of numbers that may be negative."""
PACKAGES = ("curation", "data", "datamodules", "functional", "generation", "models", "modules", "optim", "rewards")
PACKAGES += ("scaling", "strategies", "tokenizers")
EXPORTED = (callbacks, datamodules, modules, strategies)
NOT_BUILT = {"GradientAverager", "ShardedOptimizer", "ModelReward", "Rollout"}
"""Classes that code makes, not a user's settings."""
GIVEN = {
    "model": TransformerConfig(d_model=8, num_layers=1),
    TransformerConfig: TransformerConfig(d_model=8, num_layers=1),
    "server": JSONServer("http://localhost:1/v1"),
    "url": "http://localhost:1/v1",
    "texts": ["x"],
    "records": [{"prompt": "x", "completion": "y"}],
    "prompt": "question",
    "fraction": 0.5,
    Path: Path("x"),
    int: 1,
    float: 1.0,
    str: "x",
}
"""Values by the name or the type of an argument."""
MADE_WITH: dict[str, dict[str, Any]] = {"ImportanceResampling": {"fraction": 0.5}, "Language": {"languages": "en"}}
MADE_WITH |= {"WordList": {"words": ["x"]}, "DocumentedFunctions": {"questions": {"card": 1}}}
_BOTH_WAYS = TransformerConfig(d_model=8, num_layers=1, layers=Layer(mixer=Attention(causal=False)))
_READING = TransformerConfig(d_model=8, num_layers=2, layers=decoder_layers())
MADE_WITH |= {"EncoderDecoderConfig": {"encoder": _BOTH_WAYS, "decoder": _READING}}
"""Values that a class needs although they have defaults."""


def hints_of(cls) -> dict[str, Any]:
    return typing.get_type_hints(cls if issubclass(cls, Part) else cls.__init__)


def number_kind(hint) -> type | None:
    """Return int or float if a value of the type is a number or a sequence of them."""
    if hint in (int, float):
        return hint
    inside = typing.get_args(hint) if typing.get_origin(hint) in (tuple, list, Sequence, UnionType) else ()
    return next(filter(None, map(number_kind, inside)), None)


def sample(hint) -> Any:
    """Return a value of a type."""
    inside = [item for item in typing.get_args(hint) if item is not ...]
    match typing.get_origin(hint):
        case typing.Literal:
            return inside[0]
        case origin if origin in (tuple, Sequence):
            return tuple(map(sample, inside))
        case origin if origin is UnionType:
            return sample(inside[0])
        case origin if origin is Mapping:
            return {}
    if hint in GIVEN:
        return GIVEN[hint]
    return next(cls() for cls in Part.registry.values() if issubclass(cls, hint) and not (abstract(cls) or needs(cls)))


def needs(cls) -> list[str]:
    empty = [name for name, one in inspect.signature(cls).parameters.items() if one.default is one.empty]
    return [name for name in empty if name in hints_of(cls) and name != "settings"]


def abstract(cls) -> bool:
    return inspect.isabstract(cls) or (cls.__subclasses__() and cls.__name__ in ("Part", "Law"))


def classes_with_numbers() -> list[type]:
    """Return the parts of this package, and what else users are offered, that take a number."""
    for name in PACKAGES:
        importlib.import_module(f"lightning_lm.{name}")
    classes = {cls for cls in Part.registry.values() if cls.__module__.startswith("lightning_lm.")}
    offered = {getattr(package, name) for package in EXPORTED for name in package.__all__}
    classes |= {cls for cls in offered if inspect.isclass(cls) and cls.__name__ not in NOT_BUILT}
    named = sorted((cls for cls in classes if not abstract(cls)), key=lambda cls: (cls.__module__, cls.__qualname__))
    return [cls for cls in named if any(map(number_kind, hints_of(cls).values()))]


def taken(cls) -> list[str]:
    """Return the numbers of a class that it takes although they are below 0, infinite or no number."""
    hints, found = hints_of(cls), []
    given = {name: GIVEN[name] if name in GIVEN else sample(hints[name]) for name in needs(cls)}
    given |= MADE_WITH.get(cls.__name__, {})
    try:
        cls(**given)
    except ConfigurationError as error:
        return [f"{cls.__name__} is not made of {given}: {error}"]
    for name in inspect.signature(cls).parameters:
        kind = number_kind(hints.get(name))
        several = {typing.get_origin(one) for one in (hints.get(name), *typing.get_args(hints.get(name)))}
        wrong = [] if kind is None else [-1] if kind is int else [-1.0, math.nan, math.inf]
        for value in wrong:
            if value >= 0 or value != value or name not in SIGNED:
                with contextlib.suppress(ConfigurationError, DataError, MisconfigurationException):
                    cls(**{**given, name: (value, value) if several & {tuple, list, Sequence} else value})
                    found.append(f"{cls.__name__}.{name}={value}")
    return found


def test_no_part_or_callback_takes_a_number_that_makes_no_sense():
    classes = classes_with_numbers()
    assert {AdamW, CrossEntropy, Estimator, callbacks.EMA, modules.PipelineModule} <= set(classes)
    assert [one for cls in classes for one in taken(cls)] == []


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
        (Estimator, {"num_bootstraps": -1}),
        (IsoFlop, {"tolerance": math.nan}),
        (DropSmallestBudgets, {"count": -1}),
        (RandomSearch, {"num_runs": 0}),
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


def numeric_arguments(parser, verb):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from numeric_arguments(below, f"{verb} {name}")
        elif action.type is not None and not isinstance(action.type, type(Path)):
            yield f"{verb} {action.option_strings[0]}", action.type


def test_no_number_of_a_verb_is_without_a_range():
    """Of every numeric argument of every verb; the others' numbers are those of parts and callbacks, above."""
    arguments = []
    for verb in cli._VERBS:
        module = importlib.import_module(cli._VERBS[verb].module)
        parser = argparse.ArgumentParser()
        getattr(module, "add_arguments", lambda parser: None)(parser)
        arguments += numeric_arguments(parser, verb)
    assert len(arguments) > 35
    for name, kind in arguments:
        wrong = ["nan", "inf", "-inf", "1e999", "9" * 400, "9" * 9000, "one", ""]
        if not name.endswith(("presence-penalty", "frequency-penalty")):
            wrong += ["-1", "-0.5"]
        for text in wrong:
            with pytest.raises(argparse.ArgumentTypeError, match=r"must be|is no (whole )?number"):
                pytest.fail(f"{name} takes {text[:9]}: {kind(text)}")
