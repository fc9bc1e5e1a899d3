"""Folders in the format of Hugging Face: models read from them, and written so that ``from_pretrained`` opens them.

Neither direction needs ``transformers``: the weights are safetensors, the rest is JSON. Pickles are never opened.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models.config import ModelConfig
from lightning_lm.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from lightning_lm.models.huggingface.config_json import config_from_huggingface, config_to_huggingface
from lightning_lm.models.huggingface.families import FAMILIES
from lightning_lm.models.huggingface.generation_config import (
    exported_settings,
    read_generation_settings,
    set_generation_settings,
)
from lightning_lm.models.huggingface.peft_adapters import PretrainedAdapters, adapter_base, is_adapter_folder
from lightning_lm.models.huggingface.transfer import OurModel, few, fill, stored
from lightning_lm.models.huggingface.transformers_model import TransformersModel
from lightning_lm.models.huggingface.weights import (
    read_json,
    read_shapes,
    weight_files,
    write_json,
    write_tensors,
)
from lightning_lm.models.lora import merge_adapters
from lightning_lm.models.transformer import Transformer, TransformerConfig
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import INDEX, TOKENIZER_FILES, check_digests, filling

__all__ = [
    "PretrainedCheckpoint",
    "export_model",
    "known_by",
    "load_huggingface",
    "load_pretrained",
    "save_huggingface",
    "write_companions",
]


OurConfig = TransformerConfig | EncoderDecoderConfig


def load_huggingface(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    context_length: int | None = None,
) -> OurModel:
    """Return the model of a folder: its ``config.json`` and its safetensors, read one tensor at a time.

    Args:
        folder: Output of ``save_pretrained``, or a clone of a repository of the Hub.
        dtype: That of the parameters, whatever the files have.
        device: Device of the parameters.
        context_length: Tokens of a training row; ``None`` for the longest that the checkpoint names.

    Returns:
        The model in training mode, as every new module is.

    Raises:
        CheckpointError: If files are missing, broken, pickles, or do not fit the ``config.json``.
        ConfigurationError: If the architecture is not known here.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    if settings.get("model_type") == "t5" and "lm_head.weight" in read_shapes(folder):
        settings = {"scale_decoder_outputs": settings.get("tie_word_embeddings", True), **settings}
        settings["tie_word_embeddings"] = False  # whatever config.json says: this checkpoint has a head of its own
    config = config_from_huggingface(settings)
    if context_length is not None:
        config = dataclasses.replace(config, context_length=context_length)
    model = _empty(config, dtype, device)
    fill(model, FAMILIES[settings["model_type"]], folder)
    set_generation_settings(model, read_generation_settings(folder))
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
        folder: Created if needed. A kill at any moment leaves an earlier export, this one, or a folder that no reader
            opens, never files of both.
        tokenizer: Its files are written beside the weights, and its end of text ends generation, beside the ids that
            end it in the model's own `generation_settings`.
        dtype: That of the weights in the files; ``None`` for the model's own.
        family: The ``model_type`` to write; ``None`` for the first that can express the model.
        max_shard_bytes: Largest weight file, in bytes.

    Raises:
        ConfigurationError: If the model is no `Transformer`, no family can express it, or the tokenizer has more ids.
    """
    if not isinstance(model, Transformer | EncoderDecoder):
        raise ConfigurationError(
            f"save_huggingface writes a Transformer, not a {type(model).__name__}. Of a LightningModule give its "
            ".model; a model of transformers has save_pretrained."
        )
    num_ids = model.embed.num_embeddings
    if tokenizer is not None and tokenizer.vocab_size > num_ids:
        raise ConfigurationError(
            f"The tokenizer has {tokenizer.vocab_size} ids and the model {num_ids}; save it with its own tokenizer."
        )
    settings = config_to_huggingface(model.config, family=family)
    dtype = dtype or model.embed.weight.dtype
    tensors = list(stored(model, FAMILIES[settings["model_type"]], dtype))
    with filling(Path(folder), known_by=known_by(tokenizer)) as fresh:
        write_tensors(fresh, tensors, max_shard_bytes=max_shard_bytes)
        generation = write_companions(model, fresh, tokenizer, max_length=model.config.context_length)
        tokens = {name: generation.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(fresh / "config.json", {**settings, **tokens, "dtype": str(dtype).removeprefix("torch.")})


def known_by(tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Return the files by which readers know a folder with a model, for `lightning_lm.storage.filling`.

    Args:
        tokenizer: The tokenizer that is written too; without one, that of an earlier export stays.
    """
    return ("config.json",) if tokenizer is None else (*TOKENIZER_FILES, "config.json")


def write_companions(
    model: nn.Module, folder: Path, tokenizer: Tokenizer | None, *, max_length: int | None
) -> dict[str, Any]:
    """Write what lies beside the weights: the tokenizer with its chat template, and ``generation_config.json``.

    Args:
        model: Carries its `generation_settings`.
        folder: Exists.
        tokenizer: Tokenizer of the model.
        max_length: Longest text, tokens; written where the tokenizer's own files name none.

    Returns:
        The generation settings as written.
    """
    if tokenizer is not None:
        tokenizer.save(folder)
        path = folder / "tokenizer_config.json"
        if max_length is not None and path.is_file():
            settings = read_json(path)
            if "model_max_length" not in settings:
                write_json(path, {**settings, "model_max_length": max_length})
    generation = exported_settings(model, tokenizer)
    write_json(folder / "generation_config.json", generation)
    return generation


@dataclass(frozen=True, kw_only=True)
class PretrainedCheckpoint(ModelConfig):
    """A model that starts from a folder in the format of Hugging Face, to be trained on.

    Args:
        vocab_size: Ids that are needed; ``None`` for those of the tokenizer.
        context_length: Tokens of a training row; 0 for the longest that the checkpoint names.
        checkpoint: The folder; one with adapters of ``peft`` gives the model with them merged.
        dtype: That of the parameters.
        base: Folder of the model that the adapters belong to; ``None`` for the one that they name.
    """

    checkpoint: str = dataclasses.field(kw_only=False)
    context_length: int = 0
    base: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def build(self, vocab_size: int | None = None) -> nn.Module:
        """Return the model with the checkpoint's weights; families without parts of ours run by ``transformers``.

        Args:
            vocab_size: That of the tokenizer.

        Raises:
            ConfigurationError: If the tokenizer has ids that the checkpoint lacks.
            CheckpointError: If the checkpoint cannot be read.
        """
        dtype, length = getattr(torch, self.dtype), self.context_length or None
        model = load_pretrained(self.checkpoint, dtype, length, base=self.base)
        known, needed = len(model.head.weight), self.vocab_size or vocab_size
        if needed is not None and needed > known:
            raise ConfigurationError(
                f"The tokenizer has {needed} ids and {self.checkpoint} has {known}; use the checkpoint's own tokenizer."
            )
        return model


def load_pretrained(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    context_length: int | None = None,
    *,
    base: str | Path | None = None,
) -> OurModel | TransformersModel:
    """Return the model of a folder: a `Transformer` if our parts can express it, else by ``transformers`` itself.

    Args:
        folder: In the format of Hugging Face, or of ``peft``: adapters are merged into the model that they belong to.
        dtype: That of the parameters.
        context_length: Tokens of a training row, for a `Transformer`.
        base: Folder of the model that adapters belong to; ``None`` for the one that they name.

    Raises:
        CheckpointError: If files are missing or broken, or ``transformers`` cannot read them.
        ConfigurationError: If neither knows the architecture.
    """
    if is_adapter_folder(folder):
        model = load_pretrained(adapter_base(folder, base), dtype, context_length)
        PretrainedAdapters(folder=str(folder), dropout=0.0).attach(model)
        return cast(OurModel | TransformersModel, merge_adapters(model))
    _refuse_classifier(Path(folder))
    try:
        config_from_huggingface(folder)
    except ConfigurationError as error:
        return _by_transformers(Path(folder), dtype, error)
    return load_huggingface(folder, dtype=dtype, context_length=context_length)


def _by_transformers(folder: Path, dtype: torch.dtype, reason: ConfigurationError) -> TransformersModel:
    try:
        import transformers
    except ImportError:
        raise reason from None
    check_digests(folder)
    if (folder / INDEX).is_file():
        weight_files(folder)
    factory: Any = transformers.AutoModelForCausalLM
    try:
        model, loading = factory.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot read the model in {folder}: {error}") from error
    if loading["missing_keys"]:
        raise CheckpointError(
            f"{folder} has no weights for {few(sorted(loading['missing_keys']))}, which transformers would draw at "
            f"random. Is it a {type(model).__name__}, as its config.json reads?"
        )
    return TransformersModel(model.train())


def _refuse_classifier(folder: Path) -> None:
    """Refuse a reward model: its folder has no output layer, and `transformers` would make a new one."""
    settings = read_json(folder / "config.json")
    kinds = [str(name) for name in settings.get("architectures") or () if str(name).endswith("SequenceClassification")]
    if kinds:
        raise CheckpointError(
            f"{folder} holds a {kinds[0]}, not a language model. To train a reward model further: --model.model "
            f"RewardCheckpoint --model.model.checkpoint {folder}; LearnedReward scores with it."
        )


def _empty(config: OurConfig, dtype: torch.dtype, device: torch.device | str) -> OurModel:
    """Return a model whose parameters are taken but not set."""
    with torch.device("meta"):
        model = config.build()
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()  # replacing the parameters has parted them
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
    return model


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
    if hasattr(inner, "peft_config"):  # a PeftModel, or adapters that were put on without one
        inner = merge_adapters(inner.get_base_model() if hasattr(inner, "get_base_model") else inner)
    if isinstance(inner, Transformer | EncoderDecoder):
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
