"""Exchanging methods of a model's layers by kernels: tried first, reversible, parameters left alone.

Only entries in an instance's ``__dict__`` are made and taken away again: the method, and a note of its last call.
Classes of other libraries, parameters, names in the state dict, hooks and sub-modules stay as they are: sharding,
checkpoints and averaging see no difference.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lm.kernels.runtime.backend import force_backend
from lightning_lm.kernels.swap.rules import RULES, Candidate, Rule, unsupported_reason

__all__ = ["Swapped", "last_call", "restore", "swap"]

_BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Error over the largest value that rounding explains; layers in float64 often compute in float32 inside."""
_REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""Errors of a layer that is called otherwise than its kind suggests."""


_LAST_CALL = "_last_call_of_{}"
"""Name of the entry in which a layer notes its last call."""


class Swapped(NamedTuple):
    """Outcome of the swap of one method of one layer."""

    module: str
    """Its path in the model."""
    kind: str
    """Its class."""
    kernel: str
    """Kernel that runs now; empty if nothing was swapped."""
    reason: str
    """Reason why nothing was swapped."""
    layer: nn.Module
    method: str


def swap(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    device: torch.device | None = None,
) -> list[Swapped]:
    """Swap methods for kernels, after checking each against the layer's own method and a float64 reference.

    Layers that were swapped before stay as they are.

    Args:
        model: Any module.
        include: Patterns of paths of layers, such as ``layers.*.norm``.
        exclude: Patterns of paths that are left alone.
        device: Device on which the layers will run, and are tried; by default that of their parameters.

    Returns:
        One entry for each method of a known kind, swapped or not.
    """
    tried: dict[Any, tuple[Candidate | None, str]] = {}
    done = []
    for path, layer, rule in _known(model):
        method = "forward" if rule is None else rule.method
        entry = Swapped(path, type(layer).__name__, "", "", layer, method)
        if method in vars(layer):
            if not _is_ours(vars(layer)[method]):
                done.append(entry._replace(reason=f"its {method} was replaced by other code"))
            continue
        reason = _left_out(path, include, exclude)
        if reason is None and rule is None:
            reason = unsupported_reason(layer)
        if reason is not None or rule is None:
            done.append(entry._replace(reason=reason or ""))
            continue
        key = (rule.method, _signature(layer))
        if key not in tried:
            tried[key] = _choose(rule, layer, device)
        candidate, reason = tried[key]
        if candidate is not None:
            vars(layer)[rule.method] = MethodType(_method(rule, candidate), layer)
            entry = entry._replace(kernel=candidate.kernel)
        done.append(entry._replace(reason=reason))
    return done


def restore(swapped: Sequence[Swapped]) -> None:
    """Undo what `swap` did.

    Args:
        swapped: Its result.
    """
    for entry in swapped:
        if entry.kernel:
            vars(entry.layer).pop(entry.method, None)
            vars(entry.layer).pop(_LAST_CALL.format(entry.method), None)


def last_call(entry: Swapped) -> str | None:
    """Return why the last call of a swapped method went to the layer's own: ``""`` if the kernel ran.

    ``None`` stands for a method that was not called since it was swapped.

    Args:
        entry: One of the results of `swap`.
    """
    reason: str | None = vars(entry.layer).get(_LAST_CALL.format(entry.method))
    return reason


@cache
def _method(rule: Rule, candidate: Candidate) -> Callable[..., Any]:
    """Return what stands in for a method: the kernel, or the layer's own where the kernel does not compute a call."""
    note = _LAST_CALL.format(rule.method)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        reason = candidate.falls_back(self, *args, **options) if candidate.falls_back else None
        setattr(self, note, reason or "")
        if reason is None:
            return candidate.call(self, *args, **options)
        return getattr(type(self), rule.method)(self, *args, **options)

    return call


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rule | None]]:
    """Yield each layer with the rules that know it, or with none where that deserves a word."""
    for path, layer in model.named_modules():
        rules = [rule for rule in RULES if rule.fits(layer)]
        if rules:
            yield from ((path, layer, rule) for rule in rules)
        elif unsupported_reason(layer) is not None:
            yield path, layer, None


def _is_ours(method: Any) -> bool:
    ours = [_method(rule, candidate) for rule in RULES for candidate in rule.candidates]
    return getattr(method, "__func__", None) in ours


def _left_out(path: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    pattern = next((pattern for pattern in exclude if fnmatchcase(path, pattern)), None)
    if pattern is not None:
        return f"excluded by {pattern!r}"
    return None if any(fnmatchcase(path, pattern) for pattern in include) else "not included"


def _signature(layer: nn.Module) -> Any:
    """Return what decides a trial: equal layers are tried once."""
    plain = (bool, int, float, str, type(None))
    settings = tuple((key, value) for key, value in vars(layer).items() if isinstance(value, plain) or callable(value))
    shapes = tuple((name, param.shape, param.dtype) for name, param in layer.named_parameters(recurse=False))
    part = getattr(layer, "part", None)
    return type(layer), settings, shapes, part, tuple(map(_signature, layer.children()))


def _choose(rule: Rule, layer: nn.Module, device: torch.device | None) -> tuple[Candidate | None, str]:
    """Return the candidate that computes what the layer computes, or why there is none."""
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        return None, "its weights are sharded since an earlier run, and it could only be tried whole: use a fresh model"
    reason = rule.refusal(layer)
    if reason is not None:
        return None, reason
    own = next((parameter for parameter in layer.parameters()), torch.empty(0))
    place = device or own.device
    # In half precision candidates that round in different places come apart; the closest is taken.
    dtypes = [own.dtype] if own.dtype in (torch.float16, torch.bfloat16) else [own.dtype, torch.bfloat16]
    trials = []
    try:
        for dtype in dtypes:
            trials.append(_trial(rule, layer, place, dtype))
    except _REFUSALS as error:
        return None, f"it could not be tried: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    passed = [index for index in trials[0][0] if index in trials[-1][0]]
    if not passed:
        return None, next(reason for found, reason in trials if not found or reason)
    return rule.candidates[min(passed, key=trials[-1][0].__getitem__)], ""


def _trial(rule: Rule, layer: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[dict[int, float], str]:
    """Return how far the candidates that pass are from the layer's own method, or why none passes."""
    probe = _probe(layer, device, dtype)
    generator = torch.Generator(device="cpu").manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    inputs = rule.inputs(probe, make)
    own = _run(getattr(type(layer), rule.method), probe, inputs, rule.differentiable)
    exact_probe = _probe(layer, device, torch.float64, like=probe)
    exact_inputs = tuple(x.double() if isinstance(x, Tensor) else x for x in inputs)
    passed, nearest, why = {}, math.inf, ""
    for index, candidate in enumerate(rule.candidates):
        with force_backend("torch"):
            exact = _run(candidate.call, exact_probe, exact_inputs, rule.differentiable)
        difference = _error(own, exact)
        if difference > _BOUNDS[dtype]:
            nearest = min(nearest, difference)
            continue
        found = _run(candidate.call, probe, inputs, rule.differentiable)
        error = _error(found, exact)
        if error <= max(2 * difference, _BOUNDS[dtype]):
            passed[index] = _error(found, own)
        else:
            why = f"the kernel is wrong by {error:.0e}, the layer itself by {difference:.0e} ({dtype})"
    names = ", ".join(candidate.kernel for candidate in rule.candidates)
    return passed, why or f"it computes something else than {names} (differs by {nearest:.0e} at least)"


def _probe(layer: nn.Module, device: torch.device, dtype: torch.dtype, like: nn.Module | None = None) -> nn.Module:
    """Return a copy to try: weights that are zero at the start, or not there yet, would prove nothing."""
    probe = copy.deepcopy(layer if like is None else like)
    meta = any(parameter.is_meta for parameter in probe.parameters())
    probe = (probe.to_empty(device=device) if meta else probe.to(device)).to(dtype).train()
    probe.requires_grad_(True)
    if like is None:
        generator = torch.Generator(device="cpu").manual_seed(1)
        for parameter in probe.parameters():
            values = torch.randn(parameter.shape, generator=generator, device="cpu")
            values = values * parameter.size(-1) ** -0.5 if parameter.dim() > 1 else 0.5 * values + 1
            parameter.data.copy_(values)
    return probe


def _run(function: Any, probe: nn.Module, inputs: tuple[Any, ...], differentiable: int) -> list[Tensor]:
    """Return the results, and the gradients of inputs and parameters."""
    leaves = [x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        results = function(probe, *leaves)
        results = [x for x in ([results] if isinstance(results, Tensor) else results) if x is not None]
        generator = torch.Generator(device="cpu").manual_seed(2)
        upstream = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in results]
        wanted = [*leaves[:differentiable], *probe.parameters()]
        gradients = torch.autograd.grad(results, wanted, upstream, allow_unused=True)
    return [*results, *(gradient for gradient in gradients if gradient is not None)]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest error of any tensor over its largest value."""
    if [x.shape for x in found] != [x.shape for x in exact]:
        return math.inf
    worst = 0.0
    for a, b in zip((x.double() for x in found), (x.double() for x in exact), strict=True):
        error = float(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).detach())
        worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst
