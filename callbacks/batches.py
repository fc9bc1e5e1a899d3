"""Tokens of a batch and next-token logits of any module, in the forms that callbacks understand.

* A mapping with ``input_ids`` [batch, seq], and ``labels`` if not all of them are targets (unshifted, -100 is ignored).
* A pair ``(inputs, targets)`` of integer tensors of one shape [batch, seq], the targets shifted already.

Anything else, such as images and classes, has no tokens: what would be counted in tokens is then not shown.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lm.distributed import data_ranks
from lightning_lm.errors import ConfigurationError
from lightning_lm.types import IGNORE_INDEX

__all__ = [
    "context_of",
    "field_of",
    "has_targets",
    "logits_in",
    "logits_of",
    "model_context",
    "num_predictions",
    "row_length",
    "rows_per_device",
    "shifted_targets",
]


def num_predictions(batch: Any) -> int:
    """Count the positions of a batch that predict a token: each row's tokens but one, padding included.

    Only shapes are read, so that a device is never waited for. A batch without tokens counts 0.
    """
    inputs = _inputs(batch)
    return 0 if inputs is None else inputs.numel() // inputs.shape[-1] * context_of(batch)


def context_of(batch: Any) -> int:
    """Return the positions of a row that predict a token; 0 if the batch has no tokens."""
    inputs = _inputs(batch)
    if inputs is None:
        return 0
    return inputs.shape[-1] - 1 if isinstance(batch, Mapping) else inputs.shape[-1]


def _inputs(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
        return ids if isinstance(ids, Tensor) and ids.dim() and ids.numel() else None
    return batch[0] if _is_shifted_pair(batch) else None


def _is_shifted_pair(batch: Any) -> bool:
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        return False
    inputs, targets = batch
    of_ids = not any(part.is_floating_point() or part.is_complex() or part.dtype == torch.bool for part in batch)
    return of_ids and inputs.dim() == 2 and inputs.shape == targets.shape and inputs.numel() > 0


def row_length(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """Return the tokens of a row: those of the datamodule, or as many as the model can see; ``None`` if unknown.

    The rows of rollouts are unknown: they are short beside the context of most published models.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    limit = model_context(pl_module)
    if hasattr(data, "longest_row"):
        return min(data.longest_row, limit or data.longest_row) if data.longest_row else None
    own = getattr(data, "context_length", None)
    return own if isinstance(own, int) and own > 0 else limit


def model_context(pl_module: LightningModule) -> int | None:
    """Return the tokens that the model sees at most, as far as its config knows them."""
    config = getattr(getattr(pl_module, "model", None), "config", None)
    lengths = (getattr(config, name, None) for name in ("context_length", "max_position_embeddings"))
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def rows_per_device(trainer: Trainer) -> int:
    """Return the rows of a micro-batch, from the datamodule's rows per optimizer step; 1 where it does not say."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    rows = int(getattr(data, "rows_per_step", None) or getattr(data, "batch_size", None) or 1)
    return max(1, rows // (data_ranks(trainer) * trainer.accumulate_grad_batches))


def has_targets(batch: Any) -> bool:
    """Return whether `shifted_targets` accepts this batch."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("input_ids"))
        return isinstance(batch.get("input_ids"), Tensor) and isinstance(labels, Tensor) and labels.dim() == 2
    return _is_shifted_pair(batch)


def shifted_targets(batch: Any) -> Tensor:
    """Return the token that each predicting position predicts, or ``IGNORE_INDEX``: int64 [batch, positions].

    In a mapping these are the positions but the last. Without ``labels`` every token is a target, save those that
    ``attention_mask`` (0 at padding) leaves out.

    Raises:
        ConfigurationError: If the batch has no token ids.
    """
    if not has_targets(batch):
        raise ConfigurationError(
            f"A batch must be a mapping with 'input_ids' [batch, seq] (and 'labels'), or a pair (inputs, targets) of "
            f"token ids of one shape, got {_described(batch)}. Let the data loader yield one of these, or return the "
            "sums 'nll_sum' and 'num_tokens' from validation_step and remove Perplexity."
        )
    if not isinstance(batch, Mapping):
        pair: Tensor = batch[1]
        return pair
    if "labels" in batch:
        return batch["labels"][:, 1:]  # type: ignore[no-any-return]
    targets: Tensor = batch["input_ids"][:, 1:]
    mask = batch.get("attention_mask")
    return targets if mask is None else targets.masked_fill(mask[:, 1:] == 0, IGNORE_INDEX)


def _described(batch: Any) -> str:
    parts = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, list | tuple) else ()
    shapes = [f"{key}: {list(part.shape)}" for key, part in parts if isinstance(part, Tensor)]
    return f"{type(batch).__name__} ({', '.join(shapes)})" if shapes else type(batch).__name__


def field_of(outputs: Any, name: str) -> Any:
    """Return what a step's outputs hold under a name, as a key or as an attribute; ``None`` if nothing."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def logits_in(outputs: Any) -> Tensor | None:
    """Return the logits [batch, seq, vocab] that are, or are in, an output; ``None`` if there are none."""
    logits = outputs if isinstance(outputs, Tensor) else field_of(outputs, "logits")
    return logits if isinstance(logits, Tensor) and logits.ndim == 3 else None


def logits_of(trainer: Trainer, pl_module: LightningModule, input_ids: Tensor) -> Tensor:
    """Return what a module's ``forward(input_ids)`` predicts, in the trainer's precision.

    Raises:
        ConfigurationError: If it returns no logits.
    """
    with trainer.precision_plugin.val_step_context():
        outputs = pl_module(input_ids)
    logits = logits_in(outputs)
    if logits is None:
        raise ConfigurationError(
            f"{type(pl_module).__name__}(input_ids) returned {type(outputs).__name__}, not logits [batch, seq, vocab]. "
            "Let forward or validation_step return the logits, or a mapping with 'logits'."
        )
    return logits
