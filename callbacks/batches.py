"""What callbacks read from a batch: any mapping with ``input_ids``, and ``labels`` where not all are targets."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.types import IGNORE_INDEX

__all__ = ["num_predictions", "num_replicas", "row_length", "rows_per_device", "shifted_targets"]


def num_predictions(batch: Any) -> int:
    """Count the positions of a batch that predict a token: each row's tokens but one, padding included.

    Only shapes are read, so that a device is never waited for. A batch that is no mapping of tokens counts 0.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() - ids.numel() // ids.shape[-1] if isinstance(ids, Tensor) and ids.numel() else 0


def num_replicas(trainer: Trainer) -> int:
    """Return how many ranks read different batches; ranks that split a model among them read the same."""
    sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(sampler.get("num_replicas", trainer.world_size))


def row_length(trainer: Trainer, pl_module: LightningModule) -> int:
    """Return the tokens of a row as far as the datamodule or the model's config knows them; else 1."""
    config = getattr(getattr(pl_module, "model", None), "config", None)
    lengths = (
        getattr(trainer.datamodule, "context_length", None),  # type: ignore[attr-defined]
        getattr(config, "context_length", None),
        getattr(config, "max_position_embeddings", None),
    )
    return next((int(length) for length in lengths if length), 1)


def rows_per_device(trainer: Trainer) -> int:
    """Return the rows of a micro-batch, from the datamodule's rows per optimizer step; 1 where it does not say."""
    rows = int(getattr(trainer.datamodule, "batch_size", None) or 1)  # type: ignore[attr-defined]
    return max(1, rows // (num_replicas(trainer) * trainer.accumulate_grad_batches))


def shifted_targets(batch: Any) -> Tensor:
    """Return the token that each position but the last predicts, or ``IGNORE_INDEX``: int64 [batch, seq - 1].

    Without ``labels`` every token is a target, save those that ``attention_mask`` (0 at padding) leaves out.

    Raises:
        ConfigurationError: If the batch holds no token ids.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ConfigurationError(
            f"A batch must be a mapping with 'input_ids' (and 'labels'), got {type(batch).__name__}. "
            "Let the data loader yield such mappings, or return the logits' sums from validation_step."
        )
    if "labels" in batch:
        return batch["labels"][:, 1:]  # type: ignore[no-any-return]
    targets: Tensor = batch["input_ids"][:, 1:]
    mask = batch.get("attention_mask")
    return targets if mask is None else targets.masked_fill(mask[:, 1:] == 0, IGNORE_INDEX)
