"""Predicted size of an optimizer's state, before its first step."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lm.optim.combined import CombinedOptimizer

__all__ = ["predicted_state_bytes", "tensors_in"]

_NOT_FOR_META = (RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError, IndexError)
"""Errors of a step that reads values, or attributes that its constructor did not make."""
_CHOICES_OF_CODE = ("fused", "foreach", "capturable")
"""Settings of a group that choose between equal ways to compute, not all of which know the meta device."""


def predicted_state_bytes(optimizer: Optimizer, local: Callable[[Tensor], Tensor | None] = lambda param: param) -> int:
    """Return the bytes of all tensors that an optimizer keeps once it has taken a step.

    A shadow of it takes that step on the meta device, where tensors have shapes and no content, so it holds for any
    optimizer whose state does not depend on values. For others the moments are counted that their settings name.

    Args:
        optimizer: Is not changed. Its state, if it has any, is not looked at.
        local: The part of a parameter that this process updates; ``None`` for nothing.
    """
    if isinstance(optimizer, CombinedOptimizer):
        return sum(predicted_state_bytes(child, local) for child in optimizer.children)
    groups = [{**group, "params": _shadows(group["params"], local)} for group in optimizer.param_groups]
    try:
        return _after_a_step(optimizer, groups)
    except _NOT_FOR_META:
        return sum(_moments(group) * param.nbytes for group in groups for param in group["params"])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors inside dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _shadows(params: list[Tensor], local: Callable[[Tensor], Tensor | None]) -> list[Tensor]:
    parts = [part for param in params if param.requires_grad and (part := local(param)) is not None]
    shadows = [torch.empty(part.shape, dtype=part.dtype, device="meta", requires_grad=True) for part in parts]
    for shadow in shadows:
        shadow.grad = torch.empty_like(shadow)
    return shadows


def _after_a_step(optimizer: Optimizer, groups: list[dict[str, Any]]) -> int:
    shadow = object.__new__(type(optimizer))
    # A scheduler has put its own `step` on the instance; the class has the optimizer's.
    shadow.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    shadow.__dict__.update(_optimizer_step_pre_hooks=OrderedDict(), _optimizer_step_post_hooks=OrderedDict())
    plain = dict.fromkeys(_CHOICES_OF_CODE, False)
    shadow.param_groups = [{**group, **{key: plain[key] for key in plain if key in group}} for group in groups]
    shadow.state = defaultdict(dict)
    shadow.step()
    return sum(tensor.nbytes for tensor in tensors_in(dict(shadow.state)))


def _moments(group: Mapping[str, Any]) -> int:
    """Count the tensors that an optimizer keeps per parameter: two with betas (Adam's kin), one with momentum."""
    return 2 if "betas" in group else 1 if group.get("momentum") else 0
