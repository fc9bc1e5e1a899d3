"""Rules for swapping layers of foreign models: layers are recognised by their parts, not by their names.

A rule proposes; whether a proposal computes what the layer computes is decided by trying it (`kernels.swap`). So the
library that a layer comes from does not matter, and a gain that is ``1 + weight`` is found out rather than looked up.
"""

from typing import Any, cast

from torch import Tensor, nn

from lightning_lm.functional.rope import rope_frequencies, rope_table
from lightning_lm.kernels.layer_norm import layer_norm
from lightning_lm.kernels.relu_squared import relu_squared
from lightning_lm.kernels.rms_norm import rms_norm
from lightning_lm.kernels.rope import rope
from lightning_lm.kernels.swap_attention import ProjectedAttention
from lightning_lm.kernels.swap_parts import Candidate, Make, Rule
from lightning_lm.kernels.swiglu import geglu, swiglu

__all__ = ["RULES", "hopeless"]

_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("gate", "up", "down"), ("w1", "w3", "w2"))
"""Names that gated layers give to their maps."""
_PLAIN_PROJECTIONS = (("up_proj", "down_proj"), ("up", "down"), ("c_fc", "c_proj"))
"""Names that layers without a gate give to theirs."""


def _gain_of(norm: Any) -> Tensor | None:
    return cast("Tensor | None", getattr(norm, "weight", None))


def _eps_of(norm: Any) -> float:
    return cast(float, getattr(norm, "variance_epsilon", None) or norm.eps)


def _normalise(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, _gain_of(self), eps=_eps_of(self))


def _normalise_and_round(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, _gain_of(self), eps=_eps_of(self), round_first=True)


def _normalise_with_offset(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, _gain_of(self), eps=_eps_of(self), offset=getattr(self, "offset", 1.0))


class _RMSNorm(Rule):
    candidates = (
        Candidate("rms_norm", _normalise),
        Candidate("rms_norm", _normalise_and_round),
        Candidate("rms_norm (1 + gain)", _normalise_with_offset),
    )

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.RMSNorm) or "RMSNorm" in type(module).__name__

    def refusal(self, module: nn.Module) -> str | None:
        if not hasattr(module, "variance_epsilon") and not hasattr(module, "eps"):
            return "it has no eps or variance_epsilon"
        if getattr(module, "variance_epsilon", getattr(module, "eps", None)) is None:
            return "eps=None: it follows the type of the input"
        unknown = [name for name, _ in module.named_parameters() if name != "weight"]
        if unknown:
            return f"it has a parameter that the kernel does not know: {unknown[0]}"
        gain = _gain_of(module)
        return f"its gain has {gain.dim()} axes" if gain is not None and gain.dim() != 1 else None

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        gain = _gain_of(module)
        size = cast(Any, module).normalized_shape[-1] if gain is None else gain.numel()
        return (make(2, 3, size),)


def _center(self: Any, x: Tensor) -> Tensor:
    return layer_norm(x, self.weight, self.bias, eps=self.eps)


class _LayerNorm(Rule):
    candidates = (Candidate("layer_norm", _center),)

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm)

    def refusal(self, module: nn.Module) -> str | None:
        axes = len(cast(Any, module).normalized_shape)
        return f"it normalises {axes} axes together" if axes > 1 else None

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        return (make(2, 3, *cast(Any, module).normalized_shape),)


def _more_than(module: nn.Module, maps: tuple[nn.Module, ...]) -> str | None:
    known = {id(child) for child in maps}
    for name, child in module.named_children():
        if id(child) not in known and (next(child.parameters(), None) is not None or isinstance(child, nn.Dropout)):
            return f"it also holds {name}, a {type(child).__name__}"
    return None


def _names_of_maps(module: nn.Module) -> tuple[str, str, str] | None:
    all_there = (names for names in _PROJECTIONS if all(isinstance(getattr(module, x, None), nn.Module) for x in names))
    return next(all_there, None)


def _maps(module: nn.Module) -> tuple[Any, Any, Any]:
    gate, up, down = _names_of_maps(module) or ("", "", "")
    return getattr(module, gate), getattr(module, up), getattr(module, down)


def _swiglu(self: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = _maps(self)
    return cast(Tensor, down(swiglu(gate(x), up(x))))


def _geglu(self: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = _maps(self)
    return cast(Tensor, down(geglu(gate(x), up(x))))


def _geglu_tanh(self: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = _maps(self)
    return cast(Tensor, down(geglu(gate(x), up(x), approximate="tanh")))


class _Gated(Rule):
    candidates = (Candidate("swiglu", _swiglu), Candidate("geglu (tanh)", _geglu_tanh), Candidate("geglu", _geglu))

    def fits(self, module: nn.Module) -> bool:
        return _names_of_maps(module) is not None

    def refusal(self, module: nn.Module) -> str | None:
        return _more_than(module, _maps(module))

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        return (make(2, 3, _maps(module)[0].in_features),)


def _plain_maps(module: nn.Module) -> tuple[Any, Any] | None:
    """Return the maps into and out of a feed-forward layer without a gate, if it is one."""
    pairs = (tuple(getattr(module, name, None) for name in names) for names in _PLAIN_PROJECTIONS)
    is_one = (pair for pair in pairs if isinstance(pair[1], nn.Module) and hasattr(pair[0], "in_features"))
    return None if _names_of_maps(module) else cast("tuple[Any, Any] | None", next(is_one, None))


def _relu_squared(self: nn.Module, x: Tensor) -> Tensor:
    up, down = cast("tuple[Any, Any]", _plain_maps(self))
    return cast(Tensor, down(relu_squared(up(x))))


class _Plain(Rule):
    candidates = (Candidate("relu_squared", _relu_squared),)

    def fits(self, module: nn.Module) -> bool:
        return _plain_maps(module) is not None

    def refusal(self, module: nn.Module) -> str | None:
        return _more_than(module, cast("tuple[Any, Any]", _plain_maps(module)))

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        return (make(2, 3, cast("tuple[Any, Any]", _plain_maps(module))[0].in_features),)


def _turn(self: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(q, k, cos, sin, interleaved=self.part.rope.interleaved)


class _Rope(Rule):
    method = "turn"
    candidates = (Candidate("rope", _turn),)
    differentiable = 2

    def fits(self, module: nn.Module) -> bool:
        return hasattr(module, "turn") and getattr(getattr(module, "part", None), "rope", None) is not None

    def inputs(self, module: Any, make: Make) -> tuple[Any, ...]:
        q, k = make(1, 9, module.num_heads, module.head_dim), make(1, 9, module.num_kv_heads, module.head_dim)
        frequencies = rope_frequencies(module.part.rope.rotary_dim(module.head_dim))
        tables = rope_table(frequencies, 9, interleaved=module.part.rope.interleaved)
        return q, k, *(table.to(q.device) for table in tables)


RULES: tuple[Rule, ...] = (_RMSNorm(), _LayerNorm(), _Gated(), _Plain(), _Rope(), ProjectedAttention())
"""Every kind of layer that is known."""


def hopeless(module: nn.Module) -> str | None:
    """Return why a layer that one might expect to be exchanged is not, or nothing for all others.

    Args:
        module: Fits no rule.
    """
    name = type(module).__name__
    if "Norm" in name:
        return f"no kernel for {name}"
    if name.endswith("Attention") and next(module.children(), None) is not None and not hasattr(module, "attend"):
        return "its scores are not in a method of their own; choose its back-end in its own library"
    if name.endswith(("MLP", "FeedForward")):
        return "it has no gate"
    return None
