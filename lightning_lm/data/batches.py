"""Batches of users' own collate functions: optional fields are filled in, missing ones are reported."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.types import IGNORE_INDEX

__all__ = ["batch_error", "completed"]

_MASKS = ("attention_mask", "completion_mask", "assistant_masks")
"""Names under which collators of ``transformers`` and ``trl`` mark padding and prompts with 0."""


def completed(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a batch with the labels that it leaves out, and with left padding as a document of its own.

    Without labels every token is a target, except the first of a document and those that a mask of the batch excludes.

    Args:
        batch: A `types.TokenBatch`, perhaps with an ``attention_mask``.
    """
    has_labels, padding = batch.get("labels") is not None, batch.get("attention_mask")
    if has_labels and padding is None:
        return batch
    filled = dict(batch)
    documents = batch.get("document_ids")
    if documents is None and padding is not None and bool((padding[:, 0] == 0).any()):
        filled["document_ids"] = documents = padding.long()
    excluded = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for name in () if has_labels else _MASKS:
        excluded |= batch[name] == 0 if batch.get(name) is not None else False
    if documents is not None:
        excluded[:, 1:] |= documents[:, 1:] != documents[:, :-1]
    filled["labels"] = batch["labels" if has_labels else "input_ids"].masked_fill(excluded, IGNORE_INDEX)
    return filled


def batch_error(error: Exception, batch: Any, module: Any) -> Exception:
    """Return the error to raise: the given one, unless a batch lacks what a module needs.

    Args:
        error: Raised while the batch was used.
        batch: Batch as the module received it.
        module: Its class has the `types` of its batches as ``batch_type``, and the data module that makes such batches
            as ``batch_source``.
    """
    kind = getattr(module, "batch_type", None)
    if kind is None:
        return error
    name, form = type(module).__name__, f"{kind.__module__}.{kind.__name__}"
    if not isinstance(batch, Mapping):
        return ConfigurationError(
            f"A batch is a {type(batch).__name__}, and {name} needs a mapping as {form} describes it, with "
            f"{', '.join(sorted(kind.__required_keys__))}. Let the collate function of the DataLoader return one."
        )
    absent = error.args[0] if isinstance(error, KeyError) and error.args else None
    missing = [key for key in kind.__annotations__ if batch.get(key) is None and (key == absent or key in batch)]
    if not missing and absent not in batch and kind.__required_keys__.isdisjoint(batch):
        missing = sorted(kind.__required_keys__)  # another kind of batch
    if not missing:
        return error
    return ConfigurationError(
        f"A batch has {', '.join(sorted(map(str, batch))) or 'nothing'}, and {name} needs {' and '.join(missing)}, "
        f"which {form} describes. Let the collate function of the DataLoader add it, or use {module.batch_source}."
    )
