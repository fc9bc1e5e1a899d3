"""Attention inside each document of packed rows, for models of ``transformers`` on a CPU.

Those keep documents apart by a mask of all pairs of a row, and torch then scores every pair, seen or not. While a
`DocumentAttention` is active, calls of ``scaled_dot_product_attention`` whose mask is exactly that of the documents are
computed document by document, as in our own models. The model, its config and its modules are not touched.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_lm.functional.attention import Documents, causal_attention

__all__ = ["DocumentAttention", "document_attention"]


class DocumentAttention(TorchFunctionMode):
    """Context in which attention over packed rows computes no pair of tokens from different documents.

    Calls with another mask (a sliding window), dropped weights, or activations that are computed again in the backward
    pass are left to torch.

    Args:
        documents: Documents of the rows.
    """

    def __init__(self, documents: Documents) -> None:
        super().__init__()
        self._documents = documents
        self._compared: list[tuple[Tensor, bool]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, or attention by documents."""
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and len(args) == 3 and self._takes(*args[:2], options):
            return causal_attention(*args, mask=self._documents, scale=options.get("scale"))
        return func(*args, **options)

    def _takes(self, query: Tensor, key: Tensor, options: dict[str, Any]) -> bool:
        mask = options.get("attn_mask")
        if mask is None or options.get("dropout_p") or query.size(2) != key.size(2) or _saves_by_hooks():
            return False
        for known, equal in self._compared:
            if known is mask:
                return equal
        ours = self._documents.mask()
        equal = mask.dtype == torch.bool and mask.shape == ours.shape and torch.equal(mask, ours)
        self._compared.append((mask, equal))
        return equal


def _saves_by_hooks() -> bool:
    """Return whether saved activations are handed to someone else, as in checkpointing, who expects the same again."""
    active = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return active is None or active(True) is not None


def document_attention(model: nn.Module, document_ids: Tensor | None) -> AbstractContextManager[Any]:
    """Return the context that attends document by document, if that is faster: on a CPU, uncompiled.

    Args:
        model: Model of ``transformers``.
        document_ids: Ids of the documents of packed rows, int64 [batch, seq]; ``None`` if each row is one.
    """
    if document_ids is None or document_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        return nullcontext()
    documents = Documents.from_ids(document_ids)
    return nullcontext() if documents is None else DocumentAttention(documents)
