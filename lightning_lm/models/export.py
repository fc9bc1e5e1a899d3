"""Any model that was trained here as a folder that ``AutoModelForCausalLM.from_pretrained`` opens."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.huggingface.folder import known_by, save_huggingface, write_companions
from lightning_lm.models.huggingface.transformers_model import TransformersModel
from lightning_lm.models.lora import merge_adapters
from lightning_lm.models.transformer import Transformer
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import filling

__all__ = ["export_model"]


def export_model(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
) -> None:
    """Write a model in the format of Hugging Face, adapters merged, with its tokenizer beside it.

    Args:
        model: A `Transformer`, or a causal language model of ``transformers``, bare or in a `TransformersModel`. It
            stays as it is, also where ``peft`` has wrapped it.
        folder: Created if needed; each file in it is replaced whole.
        tokenizer: That of the model.
        dtype: That of the weights in the files; ``None`` for the model's own.
        family: The ``model_type`` to write a `Transformer` as; ``None`` for the first that can express it.

    Raises:
        ConfigurationError: If it is another kind of model, or no family can express it.
        MissingDependencyError: If it has adapters, and ``peft`` is not installed.
    """
    if hasattr(model, "peft_config"):
        model = merge_adapters(model)
    inner: Any = model.model if isinstance(model, TransformersModel) else model
    if hasattr(inner, "get_base_model"):  # a PeftModel
        inner = merge_adapters(inner.get_base_model())
    if isinstance(inner, Transformer):
        save_huggingface(inner, folder, tokenizer, dtype=dtype, family=family)
        return
    if not hasattr(inner, "save_pretrained"):
        raise ConfigurationError(
            f"A {type(inner).__name__} cannot be written as a Hugging Face folder. Train a model that a config of "
            "lightning_lm.models builds, or one of transformers."
        )
    with filling(Path(folder), known_by=known_by(tokenizer)) as fresh:
        _save_transformers(inner if dtype is None else copy.deepcopy(inner).to(dtype), fresh, tokenizer)


def _save_transformers(model: Any, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write a model of ``transformers``; its generation settings as they came, which its own writer may refuse."""
    kept, model.generation_config = model.generation_config, type(model.generation_config)()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = kept
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)  # safetensors makes them the owner's alone
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    write_companions(model, folder, tokenizer, max_length=length)
