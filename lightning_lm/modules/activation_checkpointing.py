"""In-place changes to the layers of a model: activation checkpointing, compilation."""

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

__all__ = ["ActivationCheckpointing", "blocks_of", "compile_blocks", "recompute_blocks"]

ActivationCheckpointing = Literal["none", "blocks", "ops"]
"""Activations that the backward pass recomputes: none; everything inside a layer; everything inside a layer but matmuls
and attention, which costs little time."""

_aten = torch.ops.aten
_KEPT_OPS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a model: the members of its outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks_of(child)


def compile_blocks(model: nn.Module) -> None:
    """Compile every layer; names of parameters stay as they are, and equal layers share their code."""
    for block in blocks_of(model):
        block.compile()


def recompute_blocks(model: nn.Module, what: ActivationCheckpointing) -> None:
    """Let every layer compute its activations again in the backward pass; names of parameters stay as they are.

    The class of each layer is replaced by a subclass, so that copies of the model behave alike.

    Source:
        Chen et al. 2016, arXiv:1604.06174; keeping products: Korthikanti et al. 2022, arXiv:2205.05198, section 5.
    """
    if what == "none":
        return
    for block in blocks_of(model):
        block.__class__ = _recomputing(type(block), what)  # type: ignore[arg-type]


@functools.cache
def _recomputing(kind: type[nn.Module], what: ActivationCheckpointing) -> type[nn.Module]:
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "ops":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _KEPT_OPS)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = functools.partial(kind.forward, self)
        if not (self.training and torch.is_grad_enabled()):
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, **options, **kwargs)

    return type(f"Recomputing{kind.__name__}", (kind,), {"forward": forward})
