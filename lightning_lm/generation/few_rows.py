"""Linear layers over few rows on a CPU, which is what decoding does most of the time.

``torch.nn.functional.linear`` computes ``x @ weight.T``. For a few rows of ``x`` MKL is far from the speed of memory at
that: the same numbers as ``(weight @ x.T).T`` take half to nine tenths of the time from 2 rows to 8. A single row goes
through a slower routine of its own, and is faster as one of two equal rows. Sums are in another order, so the last bits
of a result may differ.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["few_rows_linear", "few_rows_products"]

_FEW = 8
"""Most rows for which the other product is faster."""


def few_rows_linear(
    x: Float[Tensor, "*batch in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """Return ``x @ weight.T + bias``, by what is fastest for the number of rows; without gradients.

    Args:
        x: Features of each token.
        weight: Matrix of a linear layer.
        bias: Its bias.
    """
    num_rows = x.numel() // x.size(-1)
    if not 0 < num_rows <= _FEW or torch.is_grad_enabled() or x.dtype != torch.float32 or weight.dtype != x.dtype:
        return F.linear(x, weight, bias)
    rows = x.reshape(num_rows, -1)
    if num_rows == 1:
        product = torch.mm(weight, torch.cat((rows, rows)).t()).select(1, 0).contiguous()
    else:
        product = torch.mm(weight, rows.t()).t().contiguous()
    return (product if bias is None else product.add_(bias)).view(*x.shape[:-1], -1)


@contextlib.contextmanager
def few_rows_products(*models: Any) -> Iterator[None]:
    """Let the linear layers of models compute by `few_rows_linear`; afterwards they are as they were.

    Layers of other classes, with a forward of their own, off the CPU, and models with compiled parts are left alone.

    Args:
        *models: Anything that generates; those that are no modules are left alone.
    """
    taken = [module for model in models if isinstance(model, nn.Module) for module in _linear_layers(model)]
    for module in taken:
        module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in taken:
            module.__dict__.pop("forward", None)


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return few_rows_linear(input, module.weight, module.bias)


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    modules = list(model.modules())
    if not torch.backends.mkl.is_available() or any(_is_compiled(module) for module in modules):
        return []
    return [module for module in modules if type(module) is nn.Linear and _is_plain(module)]


def _is_plain(module: nn.Linear) -> bool:
    """Return whether a layer computes by its class, from a parameter in the memory of this process."""
    weight = module.weight
    return "forward" not in module.__dict__ and type(weight) is nn.Parameter and weight.device.type == "cpu"


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
