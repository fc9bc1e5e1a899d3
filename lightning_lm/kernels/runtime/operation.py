"""Turns a kernel into a differentiable function: one implementation, two ways in.

Eagerly an operation is an `autograd.Function`, which costs half as much per call. Under `torch.compile`, for DTensor
and wherever something listens to operations by name (selective checkpointing, FLOP counts), it is the custom operator
``torch.ops.lightning_lm.<name>``. Both call the same two functions, so their results agree bit for bit.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lightning_lm.kernels.runtime.backend import register

__all__ = ["Operation"]

Tensors = tuple[Tensor | None, ...]
_PLAIN = (Tensor, nn.Parameter)


class Operation:
    """A function of tensors and options, and its gradient.

    Both functions take all tensors first and then the options, return tuples of new tensors, and never write to what
    they are given. They run outside of autocast. Where a visible result has no gradient, backward is given zeros if all
    results are visible, and else ``None``: a hidden result may be large.

    Args:
        forward: Returns the results that the caller sees, then those that only the gradient needs.
        backward: Takes the gradients of the visible results, what `saved` chose, and the options; returns the gradients
            of the tensors, an empty one where there is none.
        schema: Schema of forward, in torch's notation: ``"(Tensor x, float eps) -> (Tensor, Tensor)"``.
        backward_schema: Schema of backward.
        fakes: Both functions again, for tensors without data: results of the right shape, type and strides.
        saved: From the tensors and all results of forward, the tensors that backward takes.
        arrange: From the results of backward, the gradients of the tensors in order, if those differ.
        visible: Number of results that the caller sees.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Tensor, ...]],
        *,
        schema: str,
        backward_schema: str,
        fakes: tuple[Callable[..., Any], Callable[..., Any]],
        saved: Callable[[Tensors, tuple[Tensor, ...]], Tensors],
        arrange: Callable[..., Tensors] | None = None,
        visible: int = 1,
    ) -> None:
        self.name = forward.__name__.strip("_").removesuffix("_forward")
        self.forward, self.backward = _without_autocast(forward), _without_autocast(backward)
        self.saved, self.arrange, self.visible = saved, arrange, visible
        self.materialize = schema.partition("->")[2].count("Tensor") == visible
        self.num_tensors = sum("Tensor" in argument for argument in schema.partition("->")[0].split(","))
        operator = _operator(self.name, self.forward, schema=schema, fake=fakes[0])
        _operator(f"{self.name}_backward", self.backward, schema=backward_schema, fake=fakes[1])
        self.overload = getattr(torch.ops.lightning_lm, self.name).default
        self.backward_overload = getattr(torch.ops.lightning_lm, f"{self.name}_backward").default
        operator.register_autograd(self._operator_backward, setup_context=self._operator_context)
        register(self.name)

    def __call__(self, *inputs: Any) -> Any:
        """Return the visible results: one tensor, or a tuple of several."""
        tensors = [tensor for tensor in inputs[: self.num_tensors] if tensor is not None]
        if torch.compiler.is_compiling() or _is_watched(tensors):
            results = _as_tuple(self.overload(*inputs))
        elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            results = _Eager.apply(self, *inputs)  # type: ignore[no-untyped-call]
        else:
            results = self.forward(*inputs)
        return results[0] if self.visible == 1 else tuple(results[: self.visible])

    def remember(self, ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        """Keep for the gradient what it needs, as saved tensors, so that checkpointing can drop them."""
        ctx.save_for_backward(*self.saved(inputs[: self.num_tensors], results))
        ctx.options = inputs[self.num_tensors :]
        ctx.set_materialize_grads(self.materialize)

    def gradients(self, ctx: Any, gradients: Tensors, backward: Callable[..., Any]) -> Tensors:
        """Return the gradients of all inputs, ``None`` for options and for tensors that need none."""
        found: Tensors = _as_tuple(backward(*gradients[: self.visible], *ctx.saved_tensors, *ctx.options))
        found = found if self.arrange is None else self.arrange(*found)
        needed = ctx.needs_input_grad[-self.num_tensors - len(ctx.options) :]
        of_tensors = (grad if need else None for grad, need in zip(found, needed, strict=False))
        return *of_tensors, *(None for _ in range(self.num_tensors - len(found) + len(ctx.options)))

    def _operator_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        self.remember(ctx, inputs, _as_tuple(output))

    def _operator_backward(self, ctx: Any, *gradients: Tensor | None) -> Tensors:
        return self.gradients(ctx, gradients, self.backward_overload)


class _Eager(torch.autograd.Function):
    """The operation with as little around it as autograd allows."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, *inputs: Any) -> tuple[Tensor, ...]:
        results = operation.forward(*inputs)
        ctx.operation = operation
        operation.remember(ctx, inputs, results)
        return results[: operation.visible]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensors:
        return None, *ctx.operation.gradients(ctx, gradients, ctx.operation.backward)


def _is_watched(tensors: list[Tensor]) -> bool:
    """Return whether somebody must see the operation by its name."""
    foreign = any(type(tensor) not in _PLAIN for tensor in tensors)
    if foreign and "torch.distributed.tensor" in sys.modules:  # which takes a while to load
        importlib.import_module("lightning_lm.kernels.runtime.dtensor_rules").register_shardings()
    return foreign or is_in_torch_dispatch_mode()


def _without_autocast(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function outside of autocast: each operation says itself in which type it computes."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        device = next(argument.device.type for argument in arguments if isinstance(argument, Tensor))
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext():
            return function(*arguments)

    return run


def _operator(name: str, function: Callable[..., Any], *, schema: str, fake: Callable[..., Any]) -> Any:
    """Return a custom operator; torch wants a single result without the tuple around it."""
    if schema.endswith("-> Tensor"):
        function, fake = _only(function), _only(fake)
    operator = torch.library.custom_op(f"lightning_lm::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _only(function: Callable[..., tuple[Tensor]]) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments)[0]


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)
