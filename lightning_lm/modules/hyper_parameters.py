"""Hyper-parameters of a run for TensorBoard, W&B and other loggers: one flat dictionary of names and plain values.

A part is written as its class and its fields: ``optimizer: AdamW``, ``optimizer/lr: 0.003``, ``model/d_model: 256``.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_lm.parts import Part

__all__ = ["hyper_parameters", "log_hyper_parameters"]

_SUFFIXES = ("_config", "_part")
_SETTINGS = ("compile_what", "activation_checkpointing")
_DATA = ("batch_size", "context_length")
_TRAINER = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")

Plain = int | float | str | bool


def log_hyper_parameters(trainer: Trainer, module: LightningModule) -> None:
    """Give every logger the hyper-parameters of a module made of parts, beside those that it saved itself.

    Args:
        trainer: The running trainer.
        module: The module in training.
    """
    values = hyper_parameters(trainer, module)
    for logger in trainer.loggers:
        logger.log_hyperparams(values)
        logger.save()


def hyper_parameters(trainer: Trainer, module: LightningModule) -> dict[str, Plain]:
    """Return the parts of a module, the size of its data's batches and the settings of its Trainer, flat.

    Args:
        trainer: The running trainer.
        module: The module in training.
    """
    data = getattr(trainer, "datamodule", None)
    tokenizer = getattr(data, "tokenizer", None)
    tree = {
        "module": type(module).__name__,
        "model": _described_model(module),
        **{_shown(name): value for name, value in vars(module).items() if _is_of_parts(value)},
        **{_shown(name): getattr(module, name, None) for name in _SETTINGS},
        "data": {
            "module": None if data is None else type(data).__name__,
            **{name: getattr(data, name, None) for name in _DATA},
            "vocab_size": getattr(tokenizer, "vocab_size", None),
        },
        "trainer": {
            **{name: getattr(trainer, name, None) for name in _TRAINER},
            "strategy": type(trainer.strategy).__name__,
        },
        "seed": os.environ.get("PL_GLOBAL_SEED"),
    }
    return dict(_flat("", tree))


def _described_model(module: LightningModule) -> Any:
    model = getattr(module, "model", None)
    config = getattr(model, "config", None)
    return config if isinstance(config, Part) else type(model).__name__


def _is_of_parts(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return bool(values) and all(isinstance(one, Part) for one in values)


def _shown(name: str) -> str:
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name.removesuffix("_what").lstrip("_")


def _flat(name: str, value: Any) -> Iterator[tuple[str, Plain]]:
    """Yield the leaves of nested data under paths; a part's class stands under the part's own name."""
    if isinstance(value, Part):
        value = value.to_dict()
    if isinstance(value, Mapping):
        kind = value.get("part")
        if kind is not None:
            yield name, kind
        for key, item in value.items():
            if key != "part":
                yield from _flat(f"{name}/{key}" if name else str(key), item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(item, Plain) for item in value):
            yield name, ", ".join(map(str, value))
        else:
            for index, item in enumerate(value):
                yield from _flat(name if len(value) == 1 else f"{name}/{index}", item)
    elif isinstance(value, Plain):
        yield name, value
