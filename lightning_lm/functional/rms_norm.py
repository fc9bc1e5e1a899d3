"""Root-mean-square normalisation, with a backward that reads memory as seldom as it can on a CPU."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["rms_norm"]


def rms_norm(
    x: Float[Tensor, "*batch size"], weight: Float[Tensor, " size"] | None, *, eps: float = 1e-6
) -> Float[Tensor, "*batch size"]:
    """Divide by the root mean square of the last axis, then multiply by a gain.

    Torch composes this of six differentiated steps on a CPU, which makes it five times as slow as its layer norm;
    there the gradient is written out. Half precision is computed in float32.

    Args:
        x: Features.
        weight: Gain of each feature; ``None`` for one.
        eps: Added to the mean square.

    Source:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    written_out = x.device.type == "cpu" and x.dtype.itemsize >= 4 and not torch.compiler.is_compiling()
    if written_out and weight is not None and x.dtype == weight.dtype:
        if not torch.is_grad_enabled():
            one_row = x.numel() == x.size(-1) and type(x) is Tensor and torch.is_inference_mode_enabled()
            return _normalise_row(x, weight, eps) if one_row else _normalise(x, weight, eps)[0]
        return cast(Tensor, _RMSNorm.apply(x, weight, eps))  # type: ignore[no-untyped-call]
    if weight is None or weight.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, eps).to(x.dtype)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


def _normalise_row(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise a single row, as of a token that is generated: its scale is a number, not a tensor of one element."""
    norm = float(torch.linalg.vector_norm(x))
    mean_square = norm * norm / x.size(-1) + eps
    return (x * weight).mul_(mean_square**-0.5 if mean_square else math.inf)


class _RMSNorm(torch.autograd.Function):
    """With ``r = 1 / rms(x)``: ``dx = r (w g - x r^2 mean(w g x))`` and ``dw = sum(r g x)`` share ``g x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, scale = _normalise(x, weight, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, scale)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = upstream
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: through torch's own steps
            result = F.rms_norm(x, weight.shape, weight, ctx.eps)
            inputs = [tensor for tensor in (x, weight) if tensor.requires_grad]
            gradients = torch.autograd.grad(result, inputs, gradient, create_graph=True)
            of = dict(zip(map(id, inputs), gradients, strict=True))
            return of.get(id(x)), of.get(id(weight)), None
        product = gradient * x
        grad_weight = scale.flatten() @ product.reshape(-1, x.size(-1))
        along = (product @ weight).unsqueeze(-1).mul_(scale.square()).div_(-x.size(-1))
        grad_x = torch.mul(x, along, out=product).addcmul_(gradient, weight).mul_(scale)
        return grad_x, grad_weight, None
