"""Weights between a folder in the format of Hugging Face and one of our models, one tensor at a time."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lm.errors import CheckpointError
from lightning_lm.models.encoder_decoder import EncoderDecoder
from lightning_lm.models.huggingface.families import Family
from lightning_lm.models.huggingface.renames import Rename, of_stack, renames_for
from lightning_lm.models.huggingface.weights import StoredTensor, read_tensors
from lightning_lm.models.transformer import Transformer

__all__ = ["OurModel", "few", "fill", "stored"]

OurModel = Transformer | EncoderDecoder
"""Models that are made of our parts."""


def _depth(model: OurModel) -> int:
    return getattr(model.config, "num_layers", 0)


def _is_tied(model: OurModel) -> bool:
    return model.head.weight is model.embed.weight


@torch.no_grad()
def fill(model: OurModel, family: Family, folder: Path) -> None:
    """Copy the tensors of a folder into a model, and insist that each side has all that the other has.

    Args:
        model: Its parameters are overwritten.
        family: Family of the folder.
        folder: Holds the weights.

    Raises:
        CheckpointError: If the folder has other weights than the model, or of other shapes.
    """
    weights = _weights(model)
    spelt = renames_for(family.names_for(model.config), weights, _depth(model))
    renames = {entry.theirs: entry for entry in spelt}
    assert {name for entry in spelt for name in entry.parameters} >= dict(model.named_parameters()).keys()
    filled, unexpected = set(), []
    for name, tensor in read_tensors(folder):
        entry = renames.get(name) or renames.get(family.prefix + name)
        if entry is not None:
            _copy(entry, tensor, weights, folder)
            filled.add(entry.theirs)
        elif not _is_unread(name, model, family):
            unexpected.append(name)
    missing = [name for name in renames if name not in filled]
    if missing or unexpected:
        raise CheckpointError(
            f"The weights in {folder} do not fit its config.json: missing {few(missing)}, not expected "
            f"{few(unexpected)}. Are both from the same model?"
        )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what checkpoints hold by name, tied weights once: parameters, and buffers such as biases of routers."""
    held = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in held}
    return {**dict(model.named_parameters()), **buffers}


def _is_unread(name: str, model: OurModel, family: Family) -> bool:
    """Return whether a name in a file means no weight of the model: a computed table, a copy, a layer beyond it."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if family.predicts_further and layer is not None and int(layer[1]) >= _depth(model):
        return True
    return name.endswith(family.not_weights) or (name == "lm_head.weight" and _is_tied(model))


def _copy(entry: Rename, tensor: Tensor, weights: dict[str, Tensor], folder: Path) -> None:
    ours = [of_stack(name, weights) for name in entry.ours]
    pieces = entry.split(tensor, [weight.shape for weight in ours])
    for name, weight, piece in zip(entry.ours, ours, pieces, strict=True):
        if piece.shape != weight.shape:
            raise CheckpointError(
                f"{entry.theirs} in {folder} gives {name} the shape {tuple(piece.shape)}, but its config.json asks for "
                f"{tuple(weight.shape)}. Are both from the same model?"
            )
        weight.copy_(piece)


def stored(model: OurModel, family: Family, dtype: torch.dtype) -> Iterator[StoredTensor]:
    """Yield the weights under the family's names, each made when its file is written.

    Args:
        model: The model to write.
        family: Family to write it as.
        dtype: That of the weights in the files; biases that balance experts stay as they are.
    """
    weights, trained = _weights(model), dict(model.named_parameters()).keys()
    for entry in renames_for(family.names_for(model.config), weights, _depth(model)):
        ours = [of_stack(name, weights).detach() for name in entry.ours]
        kept = dtype if entry.parameters[0] in trained else ours[0].dtype  # a bias of loads is lost in bfloat16
        num_bytes = sum(weight.numel() for weight in ours) * kept.itemsize
        yield StoredTensor(entry.theirs, num_bytes, partial(_joined, entry, ours, kept))


def _joined(entry: Rename, ours: list[Tensor], dtype: torch.dtype) -> Tensor:
    return entry.join(ours).to("cpu", dtype)


def few(names: list[str]) -> str:
    """Return the first of many names, and how many more there are.

    Args:
        names: Names of weights.
    """
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
