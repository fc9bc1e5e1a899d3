"""New weights for the model of a running engine, from a folder in the format of Hugging Face."""

import threading
from pathlib import Path

import torch
from torch import nn

from lightning_lm.errors import CheckpointError
from lightning_lm.models import load_huggingface
from lightning_lm.serving.engine import Engine
from lightning_lm.serving.fields import RequestError, shown

__all__ = ["allowed_folder", "update_from_folder"]


def allowed_folder(folder: str, root: str | Path) -> Path:
    """Return a folder that a client names, if it lies below the one that clients may read.

    Args:
        folder: Its path on this machine.
        root: The folder from which weights may come.

    Raises:
        RequestError: If it lies elsewhere, also by way of links.
    """
    try:
        path, allowed = Path(folder).resolve(), Path(root).resolve()
    except (OSError, ValueError) as error:  # a null character
        raise RequestError(f"model_path={shown(folder)} is no path: {error}.", param="model_path") from error
    if not path.is_relative_to(allowed):
        raise RequestError(
            f"model_path={shown(folder)} does not lie in {allowed}, from which this server takes weights. Write them "
            "there, or start the server with --update-weights FOLDER.",
            param="model_path",
            status=403,
        )
    return path


def update_from_folder(engine: Engine, folder: Path, withdrawn: threading.Event) -> bool:
    """Load the weights of a folder into the model; returns true once requests are computed with them.

    Args:
        engine: A running engine.
        folder: As `lightning_lm.models.export_model` writes it.
        withdrawn: The weights stay as they are once this is set.

    Raises:
        CheckpointError: If the folder holds a model of other weights.
        FileNotFoundError: If there is no such folder.
    """
    if not folder.is_dir():
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

    engine.change(replace, withdrawn)
    return True
