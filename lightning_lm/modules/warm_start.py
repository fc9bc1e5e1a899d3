"""Models that start from what an earlier run, or somebody else, has trained."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import ModelConfig, PretrainedCheckpoint, grow_vocabulary
from lightning_lm.modules.checkpoint import load_model
from lightning_lm.storage import resolve_checkpoint

__all__ = ["CheckpointModel"]


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
        new_tokens: Special tokens that the tokenizer there gets behind its last id; the model gets a row for each, the
            mean of its others (`models.grow_vocabulary`).
    """

    checkpoint: str
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
