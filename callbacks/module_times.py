"""Breakdown of a step's time: exclusive times of modules by role, beside their roofline time."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Ceilings", "RoleTime", "measure_ceilings", "module_times"]

_MEASURING_S = 0.5


@dataclass
class RoleTime:
    """Seconds spent in the modules of one role, without those inside of them that have another."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    flops: float = 0.0
    """FLOPs of the matmuls of a forward pass."""
    bytes: float = 0.0
    """Read and written by a forward pass that reads every operand once."""


@dataclass(frozen=True)
class Ceilings:
    """Measured matmul and copy throughput of this device."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, role: RoleTime) -> float:
        """Return the least time of a role: a backward pass, if its time is known, has twice the work of a forward."""
        passes = 3 if role.backward_s else 1
        return passes * max(role.flops / self.flops_per_s, role.bytes / self.bytes_per_s)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a large product and a large copy.

    Args:
        device: Device on which the model trains.
        dtype: Type of its products.
    """
    size = 4096 if device.type == "cuda" else 1024
    left = torch.ones(size, size, device=device, dtype=dtype)
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product_s = _best_time(lambda: left @ left, device)
    copy_s = _best_time(lambda: target.copy_(source), device)
    return Ceilings(flops_per_s=2 * size**3 / product_s, bytes_per_s=2 * source.numel() / copy_s)


def _best_time(work: Callable[[], Any], device: torch.device) -> float:
    """Return the least time of a call in half a second of calls: what else a machine does must not raise a floor."""
    work()
    times: list[float] = []
    while len(times) < 5 or sum(times) < _MEASURING_S:
        start = now(device)
        work()
        times.append(now(device) - start)
    return min(times)


def now(device: torch.device) -> float:
    """Return the time in seconds, after all that the device was given to do.

    Args:
        device: Device on which the model trains.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def role_of(module: nn.Module, ancestors: tuple[str, ...]) -> str | None:
    """Return the role of a module, or nothing if its time belongs to what holds it.

    Args:
        module: The module.
        ancestors: Classes of what holds it.
    """
    kind = type(module).__name__
    holder = next((name for name in reversed(ancestors) if _layer_of(name)), "")
    if "Norm" in kind:
        return "norms"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if getattr(module, "weight", None) is not None and getattr(module.weight, "ndim", 0) == 2:
        return f"{_layer_of(holder)} projections" if holder else "head"
    if _layer_of(kind):
        return f"{_layer_of(kind)}, the rest"
    return None


def _layer_of(kind: str) -> str:
    if "Attention" in kind:
        return "attention"
    return "feed-forward" if kind.endswith(("MLP", "FeedForward", "MoE", "Experts")) else ""


@contextlib.contextmanager
def module_times(model: nn.Module, device: torch.device) -> Iterator[dict[str, RoleTime]]:
    """Time every module inside, forward and backward, waiting for the device around each; yields times by role.

    Args:
        model: Runs inside.
        device: Device on which the model trains.
    """
    times: dict[str, RoleTime] = defaultdict(RoleTime)
    watch = _Watch(times, device)
    handles = []
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    for path, module in model.named_modules():
        parents = path.split(".")
        ancestors = tuple(kinds[".".join(parents[:depth])] for depth in range(len(parents)))
        role = role_of(module, ancestors)
        if role is not None:
            handles += watch.follow(module, role)
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """A stack of running modules: the time of an inner one is taken off the outer one's."""

    def __init__(self, times: dict[str, RoleTime], device: torch.device) -> None:
        self.times, self.device = times, device
        self.running: list[list[float]] = []

    def follow(self, module: nn.Module, role: str) -> list[Any]:
        """Hang hooks on a module; return their handles."""
        handles: list[Any] = [
            module.register_forward_pre_hook(lambda *_: self.begin()),
            module.register_forward_hook(lambda mod, args, out: self.end_forward(role, mod, args, out)),
        ]
        # The ids of an embedding have no gradient whose arrival could be waited for; attention that is given the same
        # tensor three times projects it at once, and with hooks of the backward pass would be given three views.
        if role != "embedding" and not isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_full_backward_pre_hook(lambda *_: self.begin()))
            handles.append(module.register_full_backward_hook(lambda *_: self.end_backward(role)))
        return handles

    def begin(self) -> None:
        self.running.append([now(self.device), 0.0])

    def end(self) -> float:
        start, inside = self.running.pop()
        elapsed = now(self.device) - start
        if self.running:
            self.running[-1][1] += elapsed
        return elapsed - inside

    def end_forward(self, role: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        time_s = self.end()
        entry = self.times[role]
        entry.forward_s += time_s
        if next(module.children(), None) is None and isinstance(out, Tensor):
            tensors = [x for x in (*args, out, *module.parameters()) if isinstance(x, Tensor)]
            entry.bytes += sum(x.numel() * x.element_size() for x in tensors if role != "embedding" or x is out)
            weight = getattr(module, "weight", None)
            if role.endswith("projections") or role == "head":
                entry.flops += 2.0 * out.numel() * weight.numel() / out.size(-1) if weight is not None else 0.0

    def end_backward(self, role: str) -> None:
        if self.running:
            self.times[role].backward_s += self.end()
