"""New weights for the model of a running engine, from a folder in the format of Hugging Face."""

from pathlib import Path

import torch
from torch import nn

from lightning_lm.errors import CheckpointError
from lightning_lm.models import load_huggingface
from lightning_lm.serving.engine import Engine

__all__ = ["update_from_folder"]


def update_from_folder(engine: Engine, folder: str) -> None:
    """Load the weights of a folder into the model; returns once requests are computed with them.

    Args:
        engine: A running engine.
        folder: As `lightning_lm.models.export_model` writes it.

    Raises:
        CheckpointError: If the folder holds a model of other weights.
        FileNotFoundError: If there is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder on this machine.")
    weights = load_huggingface(folder).state_dict()
    model: nn.Module = engine.model
    own = model.state_dict()
    different = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if different:
        raise CheckpointError(
            f"{folder} holds another model: {', '.join(different[:3])} differ in shape, or are in one of them only. "
            "Export the model that is served here."
        )

    def replace() -> None:
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])

    engine.change(replace)
