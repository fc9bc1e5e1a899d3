"""Contents of our checkpoints besides Lightning's own entries, and reading them without running anyone's code.

A model may start from what an earlier run, or somebody else, has trained: `CheckpointModel`.
"""

import contextlib
import dataclasses
import errno
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lm.errors import CheckpointError, ConfigurationError, TokenizerError
from lightning_lm.models import (
    ModelConfig,
    PretrainedCheckpoint,
    attach_adapters,
    grow_vocabulary,
    merge_adapters,
    set_generation_settings,
)
from lightning_lm.models.huggingface.folder import load_pretrained
from lightning_lm.models.huggingface.peft_adapters import adapter_base, is_adapter_folder
from lightning_lm.parts import Part
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import check_archive, resolve_checkpoint
from lightning_lm.tokenizers import load_tokenizer, tokenizer_from_files

__all__ = [
    "ADAPTERS",
    "ENTRY",
    "VERSION",
    "CheckpointModel",
    "check_config",
    "check_weights",
    "is_reward_model",
    "load_config",
    "load_model",
    "read_checkpoint",
    "reading",
    "saved_adapters",
    "tokenizer_of_folder",
]

ENTRY = "lightning_lm"
"""Key of our entry in a checkpoint."""
ADAPTERS = "lightning_lm_adapters"
"""Key of the description of the adapters that the callback `LoRA` has put on a model of any module."""
VERSION = 1
"""Layout of our entry."""


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Compare a checkpoint's records with their checksums; turn what goes wrong then into an error with a remedy.

    Args:
        path: The checkpoint; only files have checksums here.

    Raises:
        CheckpointError: If the file is truncated, damaged, is no checkpoint, or holds more than tensors and plain data.
    """
    try:
        if Path(path).is_file():
            check_archive(path)
            _require_begin(path)
        yield
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} cannot be read: it is truncated or no checkpoint.") from error
        raise CheckpointError(
            f"{path} holds objects other than tensors and plain data, or is no checkpoint. It was not loaded, because "
            "unpickling foreign objects can run any code. If you trust its author, load it with torch.load(..., "
            "weights_only=False) yourself and save its tensors again."
        ) from error
    except (RuntimeError, EOFError, UnicodeDecodeError, KeyError, IndexError, OSError) as error:
        # A zip archive that ends early makes torch seek before its beginning, which is "Invalid argument".
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise CheckpointError(
            f"{path} cannot be read: it is truncated or no checkpoint. Use an earlier checkpoint of the run "
            f"(often in the same folder). torch says: {str(error).partition(chr(10))[0] or error!r}"
        ) from error


def _require_begin(path: Path | str) -> None:
    """Refuse a file that torch would read as a pickle although it is none: that fails in any way."""
    with Path(path).open("rb") as file:
        begin = file.read(4)
    if begin and begin[:1] not in (b"P", b"\x80"):  # an archive, or what torch wrote before it wrote archives
        raise CheckpointError(f"{path} is no checkpoint: it begins with {begin!r}. Name the .ckpt that a run saved.")


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain data are accepted.

    Tensors are mapped into memory: those that nobody looks at, such as an optimizer's, are never read.

    Args:
        path: A ``.ckpt`` that Lightning wrote.

    Raises:
        CheckpointError: If the file is truncated, is no checkpoint, or holds anything else.
        FileNotFoundError: If there is no such file.
    """
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no Lightning checkpoint: it has no 'state_dict'.")
    return checkpoint


def load_model(
    path: Path | str, *, merged: bool = True, base: Path | str | None = None
) -> tuple[nn.Module, Tokenizer | None]:
    """Return the model of a checkpoint, with its weights and ready for use, and its tokenizer if it carries one.

    Args:
        path: A ``.ckpt`` that a module of this package wrote, or a folder in the format of Hugging Face or ``peft``, or
            the folder of runs, such as ``runs/sft_reverse``, for the newest that has finished.
        merged: Merge adapters into the weights; those of a folder always are.
        base: Folder of the model that a folder of adapters belongs to; ``None`` for the one that they name.

    Raises:
        CheckpointError: If the file is truncated, foreign, or holds the weights of another model.
        FileNotFoundError: If there is no such file.
    """
    path = resolve_checkpoint(path) if Path(path).is_dir() else path
    if Path(path).is_dir():
        return load_pretrained(path, base=base).eval(), tokenizer_of_folder(Path(path), base)
    checkpoint = read_checkpoint(path)
    entry = checkpoint.get(ENTRY)
    if entry is None or entry["model"] is None:
        raise CheckpointError(
            f"{path} does not describe its model: it was written by a module that is not ours, or that was given an "
            "nn.Module which no config can build again. Build it as before, load the checkpoint with "
            "module = SFTModule.load_from_checkpoint(path, model=model), or the class that wrote it, and use "
            "module.model; lightning_lm.models.export_model(module.model, folder) exports it."
        )
    model = ModelConfig.from_dict(entry["model"]).build()
    prefix = "model."
    # A critic's or a reference's weights lie beside it.
    states = checkpoint["state_dict"].items()
    weights = {name.removeprefix(prefix): value for name, value in states if name.startswith(prefix)}
    if any(name.startswith("backbone.") for name in weights):
        raise CheckpointError(
            f"{path} holds a reward model, not a language model. Train it further with --model.model RewardCheckpoint "
            f"--model.model.checkpoint {path}; load_reward_model reads it, LearnedReward scores with it."
        )
    floating = [value.dtype for value in weights.values() if value.is_floating_point()]
    model.to(floating[0])
    adapters = saved_adapters(checkpoint)
    if adapters is not None:
        attach_adapters(model, adapters)
    check_weights(weights, model.state_dict(), source=str(path))
    model.load_state_dict(weights)
    model = merge_adapters(model) if merged and adapters is not None else model
    if entry.get("generation"):
        set_generation_settings(model, entry["generation"])
    return model.eval(), _tokenizer(entry["tokenizer"])


def is_reward_model(path: Path | str) -> bool:
    """Tell whether a checkpoint is that of a reward model; its weights are not read.

    Args:
        path: A ``.ckpt`` that Lightning wrote.

    Raises:
        CheckpointError: If the file is truncated, is no checkpoint, or holds more than tensors and plain data.
    """
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return any(name.startswith("model.backbone.") for name in checkpoint.get("state_dict", ()))


def load_config(path: Path | str, given: object = None) -> ModelConfig | None:
    """Return the config of a checkpoint's model where that is needed to load it; the weights are not read.

    Args:
        path: The checkpoint.
        given: The model or config that the caller has; a config that leaves its vocabulary size out gets it.

    Returns:
        ``None`` if the given one will do, or the file does not describe its model.

    Raises:
        CheckpointError: If the file is truncated, is no checkpoint, or holds more than tensors and plain data.
    """
    incomplete = isinstance(given, ModelConfig) and given.vocab_size is None
    if not (given is None or incomplete) or not Path(path).is_file():
        return None
    with reading(path):
        entry = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(ENTRY) or {}
    description = entry.get("model")
    if isinstance(given, ModelConfig):
        return dataclasses.replace(given, vocab_size=(description or {}).get("vocab_size"))
    return None if description is None else ModelConfig.from_dict(description)


def saved_adapters(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the description of the adapters in a checkpoint, for `models.attach_adapters`; ``None`` without adapters.

    Args:
        checkpoint: Its content.
    """
    described = (checkpoint.get(ENTRY) or {}).get("adapters") or checkpoint.get(ADAPTERS)
    return None if described is None else dict(described)


def tokenizer_of_folder(folder: Path, base: Path | str | None = None) -> Tokenizer | None:
    """Return the tokenizer that lies in a folder, or beside the model of its adapters; ``None`` if there is none.

    Args:
        folder: In the format of Hugging Face or ``peft``.
        base: Folder of the model that the adapters belong to; ``None`` for the one that they name.
    """
    for path in (folder, *([adapter_base(folder, base)] if is_adapter_folder(folder) else [])):
        with contextlib.suppress(TokenizerError):
            return load_tokenizer(path)
    return None


def _tokenizer(files: dict[str, str] | None) -> Tokenizer | None:
    return None if files is None else tokenizer_from_files(files)


def check_weights(found: Mapping[str, Tensor], needed: Mapping[str, Tensor], *, source: str) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: If they differ.
    """
    problems = [f"{name} is missing" for name in needed if name not in found]
    problems += [f"{name} is not part of this model" for name in found if name not in needed]
    problems += [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in needed.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source} holds the weights of another model: {'; '.join(problems[:3])}{more}. "
            "Use the configuration that wrote it, or start without it."
        )


def check_config(found: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None) -> None:
    """Compare the descriptions of two models, where both have one.

    Raises:
        CheckpointError: If they differ, with every field that does.
    """
    differences: list[str] = []
    if found is not None and wanted is not None:  # training adds the ends of its template to the generation settings
        differences = _differences(_spelt_out(found), _spelt_out(wanted))
    if differences:
        raise CheckpointError(
            f"The checkpoint holds another model: {'; '.join(differences)}. Resume with the configuration that "
            "wrote it, or start without the checkpoint."
        )


def _spelt_out(description: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a description with the fields that its parts did not have yet when it was written."""
    plain = {name: value for name, value in description.items() if name != "generation"}
    try:
        return Part.from_dict(plain).to_dict()
    except ConfigurationError:  # of a part that is not known here, or of none
        return plain


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Return one line for every field in which two descriptions (`Part.to_dict`) differ."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = [*wanted, *(name for name in found if name not in wanted)]
        return [
            line
            for name in names
            for line in _differences(found.get(name), wanted.get(name), f"{path}.{name}" if path else name)
        ]
    if found == wanted:
        return []
    return [f"{path}: {_brief(found)} in the checkpoint, {_brief(wanted)} here"]


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, kw_only=True)
class CheckpointModel(ModelConfig):
    """A model that starts from a ``.ckpt`` of this package or from a folder in the format of Hugging Face.

    Adapters, those of ``peft`` too, become part of the weights; to train on with them apart, give the callback `LoRA`
    the folder (`PretrainedAdapters`) and the model its base. A data module without a tokenizer takes the one that lies
    there too.

    Args:
        vocab_size: Ids that are needed; ``None`` for those of the tokenizer.
        context_length: Tokens of a training row; 0 for what the checkpoint names. A ``.ckpt`` keeps its own.
        checkpoint: The file or folder; or the folder of the runs of a name, such as ``runs/sft_reverse``: then that of
            the newest run that has finished.
        base: Folder of the model that a folder of adapters belongs to; ``None`` for the one that they name.
        new_tokens: Special tokens that the tokenizer there gets after its last id; the model gets a row for each, the
            mean of its others (`models.grow_vocabulary`).
    """

    checkpoint: str = dataclasses.field(kw_only=False)
    context_length: int = 0
    base: str | None = None
    new_tokens: tuple[str, ...] = ()

    def build(self, vocab_size: int | None = None) -> nn.Module:
        """Return the model with the checkpoint's weights.

        Args:
            vocab_size: That of the tokenizer.

        Raises:
            CheckpointError: If there is no checkpoint, or it cannot be read.
            ConfigurationError: If the tokenizer has ids that the checkpoint lacks.
        """
        needed = self.vocab_size or vocab_size
        model: Any = self._load().train()
        if self.new_tokens and needed is not None:
            grow_vocabulary(model, needed)
        known = len(model.head.weight)
        if needed is not None and needed > known:
            raise ConfigurationError(
                f"The tokenizer has {needed} ids and the model in {self.checkpoint} has {known}; use the tokenizer in "
                "it. Special tokens that it lacks are added with --model.model.new_tokens."
            )
        return cast(nn.Module, model)

    def _load(self) -> nn.Module:
        path = resolve_checkpoint(self.checkpoint)
        if path.is_dir():
            return PretrainedCheckpoint(
                checkpoint=str(path), context_length=self.context_length, base=self.base
            ).build()
        return load_model(path)[0]
