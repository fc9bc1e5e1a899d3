"""Checkpoints in the format of Hugging Face: read from a folder, and written so that ``transformers`` opens them.

Neither direction needs ``transformers``: the weights are safetensors, the rest is JSON. Pickles are never opened.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models.config import ModelConfig, TransformerConfig
from lightning_lm.models.families import FAMILIES, Family
from lightning_lm.models.huggingface_config import config_from_huggingface, config_to_huggingface
from lightning_lm.models.transformer import Transformer
from lightning_lm.models.weight_files import StoredTensor, read_json, read_tensors, write_json, write_tensors
from lightning_lm.models.weight_names import Rename, renames_for
from lightning_lm.protocols import Tokenizer

__all__ = ["PretrainedCheckpoint", "load_huggingface", "save_huggingface"]


def load_huggingface(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    context_length: int | None = None,
) -> Transformer:
    """Return the model of a folder: its ``config.json`` and its safetensors, read one tensor at a time.

    Args:
        folder: What ``save_pretrained`` wrote, or a clone of a repository of the Hub.
        dtype: That of the parameters, whatever the files have.
        device: Where the parameters shall be.
        context_length: Tokens of a training row; ``None`` for the longest that the checkpoint names.

    Returns:
        The model in training mode, as every new module is.

    Raises:
        CheckpointError: If files are missing, broken, pickles, or do not fit the ``config.json``.
        ConfigurationError: If the architecture is not known here.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    config = config_from_huggingface(settings)
    if context_length is not None:
        config = dataclasses.replace(config, context_length=context_length)
    model = _empty(config, dtype, device)
    _fill(model, FAMILIES[settings["model_type"]], folder)
    return model


def save_huggingface(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` opens, and `load_huggingface` as well.

    Args:
        model: A `Transformer`.
        folder: Created if needed; each file in it is replaced whole.
        tokenizer: Its files are written beside the weights, and its end of text ends generation.
        dtype: That of the weights in the files; ``None`` for the model's own.
        family: The ``model_type`` to write; ``None`` for the first that can express the model.
        max_shard_bytes: Largest weight file, in bytes.

    Raises:
        ConfigurationError: If the model is no `Transformer`, no family can express it, or the tokenizer has more ids.
    """
    if not isinstance(model, Transformer):
        raise ConfigurationError(
            f"save_huggingface writes a Transformer, not a {type(model).__name__}. Of a LightningModule give its "
            ".model; a model of transformers has save_pretrained."
        )
    num_ids = model.embed.num_embeddings
    if tokenizer is not None and tokenizer.vocab_size > num_ids:
        raise ConfigurationError(
            f"The tokenizer has {tokenizer.vocab_size} ids and the model {num_ids}; save it with its own tokenizer."
        )
    folder = Path(folder)
    settings = config_to_huggingface(model.config, family=family)
    dtype = dtype or model.embed.weight.dtype
    tensors = list(_stored(model, FAMILIES[settings["model_type"]], dtype))
    write_tensors(folder, tensors, max_shard_bytes=max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)
    eos_id = None if tokenizer is None else tokenizer.eos_id
    tokens = {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": None}
    write_json(folder / "generation_config.json", {name: token for name, token in tokens.items() if token is not None})
    write_json(folder / "config.json", {**settings, **tokens, "dtype": str(dtype).removeprefix("torch.")})


@dataclass(frozen=True, kw_only=True)
class PretrainedCheckpoint(ModelConfig):
    """A model that starts from a folder in the format of Hugging Face, to be trained on.

    Args:
        vocab_size: Ids that are needed; ``None`` for those of the tokenizer.
        context_length: Tokens of a training row; 0 for the longest that the checkpoint names.
        checkpoint: The folder.
        dtype: That of the parameters.
    """

    checkpoint: str
    context_length: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def build(self, vocab_size: int | None = None) -> Transformer:
        """Return the model with the checkpoint's weights.

        Args:
            vocab_size: That of the tokenizer.

        Raises:
            ConfigurationError: If the tokenizer has ids that the checkpoint lacks.
            CheckpointError: If the checkpoint cannot be read.
        """
        known = config_from_huggingface(self.checkpoint).vocab_size
        needed = self.vocab_size or vocab_size
        if needed is not None and known is not None and needed > known:
            raise ConfigurationError(
                f"The tokenizer has {needed} ids and {self.checkpoint} has {known}; use the checkpoint's own tokenizer."
            )
        return load_huggingface(
            self.checkpoint, dtype=getattr(torch, self.dtype), context_length=self.context_length or None
        )


def _empty(config: TransformerConfig, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """Return a model whose parameters are taken but not set."""
    with torch.device("meta"):
        model = config.build()
    model = model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:  # replacing the parameters has parted them
        model.head.weight = model.embed.weight
    return model


@torch.no_grad()
def _fill(model: Transformer, family: Family, folder: Path) -> None:
    """Copy the tensors of a folder into a model, and insist that each side has all that the other has."""
    parameters = dict(model.named_parameters())
    renames = {entry.theirs: entry for entry in renames_for(family.names, parameters, model.config.num_layers)}
    assert {name for entry in renames.values() for name in entry.ours} == parameters.keys()
    filled, unexpected = set(), []
    for name, tensor in read_tensors(folder):
        entry = renames.get(name) or renames.get(family.prefix + name)
        if entry is not None:
            _copy(entry, tensor, parameters, folder)
            filled.add(entry.theirs)
        elif not (name.endswith(family.not_weights) or (name == "lm_head.weight" and model.config.tie_embeddings)):
            unexpected.append(name)
    missing = [name for name in renames if name not in filled]
    if missing or unexpected:
        raise CheckpointError(
            f"The weights in {folder} do not fit its config.json: missing {_few(missing)}, not expected "
            f"{_few(unexpected)}. Are both from the same model?"
        )


def _copy(entry: Rename, tensor: Tensor, parameters: dict[str, nn.Parameter], folder: Path) -> None:
    pieces = entry.split(tensor)
    for name, piece in zip(entry.ours, pieces, strict=True):
        if piece.shape != parameters[name].shape:
            raise CheckpointError(
                f"{entry.theirs} in {folder} gives {name} the shape {tuple(piece.shape)}, but its config.json asks for "
                f"{tuple(parameters[name].shape)}. Are both from the same model?"
            )
        parameters[name].copy_(piece)


def _stored(model: Transformer, family: Family, dtype: torch.dtype) -> Iterator[StoredTensor]:
    """Yield the weights under the family's names, each made when its file is written."""
    parameters = dict(model.named_parameters())
    for entry in renames_for(family.names, parameters, model.config.num_layers):
        ours = [parameters[name].detach() for name in entry.ours]
        num_bytes = sum(weight.numel() for weight in ours) * dtype.itemsize
        yield StoredTensor(entry.theirs, num_bytes, partial(_joined, entry, ours, dtype))


def _joined(entry: Rename, ours: list[Tensor], dtype: torch.dtype) -> Tensor:
    return entry.join(ours).to("cpu", dtype)


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
