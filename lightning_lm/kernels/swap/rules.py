"""Rules for swapping layers of foreign models: layers are recognised by their parts, not by their names.

A rule proposes; whether a proposal computes what the layer computes is decided by trying it (`kernels.swap`). So the
library that a layer comes from does not matter, and a gain that is ``1 + weight`` is found out rather than looked up.

Attention layers that hold their projections, as in ``transformers``, have one method for everything; they take their
rotation from a function of their module and their scores from a registry, and neither can be swapped for one model
only. So the whole method is, and where a call is anything but plain causal attention over its own tokens (a mask of all
pairs for packed or padded rows, a cache that holds tokens, more to return), it goes to the layer's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_lm.functional.rope import rope_frequencies, rope_table
from lightning_lm.kernels.attention import attention
from lightning_lm.kernels.layer_norm import layer_norm
from lightning_lm.kernels.relu_squared import relu_squared
from lightning_lm.kernels.rms_norm import rms_norm
from lightning_lm.kernels.rope import rope
from lightning_lm.kernels.swiglu import geglu, swiglu

__all__ = ["RULES", "Candidate", "Make", "ProjectedAttention", "Rule", "unsupported_reason"]

Make = Callable[..., Tensor]


class Candidate(NamedTuple):
    """A function that may stand in for a method."""

    kernel: str
    call: Callable[..., Any]
    """Takes the module first."""
    falls_back: Callable[..., str | None] | None = None
    """Takes the same arguments; returns why this call needs the layer's own method, ``None`` for most calls."""


class Rule:
    """Rule for layers of one kind: the formulas they may compute, and a way to try them."""

    method = "forward"
    candidates: tuple[Candidate, ...] = ()
    differentiable = 1
    """Inputs that have gradients; they come first."""

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module is of this kind."""
        raise NotImplementedError

    def refusal(self, module: nn.Module) -> str | None:  # noqa: ARG002
        """Return why a module of this kind is unsupported, if that is known without a trial."""
        return None

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        """Return inputs to try the method with.

        Args:
            module: Layer to try.
            make: Takes a shape and returns normal numbers.
        """
        raise NotImplementedError


_ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_CACHES = ("cache", "past_key_values")
"""Keywords of the key-value cache in different releases of ``transformers``."""
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "num_items_in_batch"})
"""Keywords that do not change what a layer computes."""


def _falls_back(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    *further: Any,
    **options: Any,
) -> str | None:
    """Return what makes a call more than plain causal attention over the tokens that it is given."""
    unknown = [name for name, value in options.items() if value is not None and name not in (*_HARMLESS, *_CACHES)]
    if position_embeddings is None:
        return "it is given no cosines and sines"
    if attention_mask is not None:
        return "it is given a mask of all pairs, for packed or padded rows or a window"
    if further or unknown:
        return f"it is given {', '.join(unknown) or 'positional arguments'}, which the kernel does not know"
    return "its cache holds tokens" if _has_tokens(self, _cache_of(options)) else None


def _project_rotate_and_attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend causally to the tokens that are given, as the layer does when `_falls_back` finds nothing more."""
    shape = *hidden_states.shape[:-1], -1, self.head_dim
    q, k, v = (getattr(self, name)(hidden_states).view(shape) for name in _ATTENTION_PROJECTIONS[:3])
    norms = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
    q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
    q, k, v = (x.transpose(1, 2) for x in (*rope(q, k, *_tables(*position_embeddings)), v))
    cache = _cache_of(options)
    if cache is not None:
        length = k.size(2)
        k, v = (x[:, :, :length] for x in cache.update(k, v, self.layer_idx))
    mixed = attention(q, k, v, scale=self.scaling)
    return self.o_proj(mixed.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


def _cache_of(options: dict[str, Any]) -> Any:
    return next((options[name] for name in _CACHES if options.get(name) is not None), None)


def _has_tokens(layer: Any, cache: Any) -> bool:
    """Return whether a cache has seen tokens, or counts them on the device, where asking would wait."""
    if cache is None:
        return False
    seen = cache.get_seq_length(layer.layer_idx)
    return not isinstance(seen, int) or seen > 0


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return tables of [batch, seq, dim] as `rope` takes them: an axis for heads, ``-sin`` for the first features."""
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(-2), torch.cat((-first, second), dim=-1).unsqueeze(-2)


class ProjectedAttention(Rule):
    """Rule for layers with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` that are given cosines and sines."""

    candidates = (Candidate("rope and attention", _project_rotate_and_attend, _falls_back),)

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module is of this kind."""
        parts = all(isinstance(getattr(module, name, None), nn.Module) for name in _ATTENTION_PROJECTIONS)
        return parts and all(hasattr(module, name) for name in ("head_dim", "scaling", "config", "layer_idx"))

    def refusal(self, module: nn.Module) -> str | None:
        """Return why a module of this kind is unsupported, if that is known without a trial."""
        layer = cast(Any, module)
        chosen = getattr(layer.config, "_attn_implementation", None)
        if chosen != "sdpa":
            why = "which is given a mask of all pairs" if chosen == "eager" else "which is left alone"
            return f"its config asks for {chosen} attention, {why}; attn_implementation='sdpa' can be swapped"
        if getattr(layer, "attention_dropout", 0.0):
            return f"dropout={layer.attention_dropout} of attention weights"
        return None if getattr(layer, "is_causal", True) else "it attends to later tokens too"

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        """Return inputs to try the method with: tokens, their cosines and sines, no mask."""
        layer = cast(Any, module)
        hidden = make(2, 7, layer.q_proj.in_features)
        angles = make(2, 7, layer.head_dim // 2).repeat(1, 1, 2)
        return hidden, (angles.cos(), angles.sin()), None


_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("gate", "up", "down"), ("w1", "w3", "w2"))
"""Names that gated layers give to their projections."""
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


def _more_than(module: nn.Module, projections: tuple[nn.Module, ...]) -> str | None:
    known = {id(child) for child in projections}
    for name, child in module.named_children():
        if id(child) not in known and (next(child.parameters(), None) is not None or isinstance(child, nn.Dropout)):
            return f"it also holds {name}, a {type(child).__name__}"
    return None


def _projection_names(module: nn.Module) -> tuple[str, str, str] | None:
    all_there = (names for names in _PROJECTIONS if all(isinstance(getattr(module, x, None), nn.Module) for x in names))
    return next(all_there, None)


def _projections(module: nn.Module) -> tuple[Any, Any, Any]:
    gate, up, down = _projection_names(module) or ("", "", "")
    return getattr(module, gate), getattr(module, up), getattr(module, down)


def _swiglu(self: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = _projections(self)
    return cast(Tensor, down(swiglu(gate(x), up(x))))


def _geglu(self: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = _projections(self)
    return cast(Tensor, down(geglu(gate(x), up(x))))


def _geglu_tanh(self: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = _projections(self)
    return cast(Tensor, down(geglu(gate(x), up(x), approximate="tanh")))


class _Gated(Rule):
    candidates = (Candidate("swiglu", _swiglu), Candidate("geglu (tanh)", _geglu_tanh), Candidate("geglu", _geglu))

    def fits(self, module: nn.Module) -> bool:
        return _projection_names(module) is not None

    def refusal(self, module: nn.Module) -> str | None:
        return _more_than(module, _projections(module))

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        return (make(2, 3, _projections(module)[0].in_features),)


def _ungated_projections(module: nn.Module) -> tuple[Any, Any] | None:
    """Return the linear layers of a feed-forward layer without a gate, if it is one."""
    pairs = (tuple(getattr(module, name, None) for name in names) for names in _PLAIN_PROJECTIONS)
    is_one = (pair for pair in pairs if isinstance(pair[1], nn.Module) and hasattr(pair[0], "in_features"))
    return None if _projection_names(module) else cast("tuple[Any, Any] | None", next(is_one, None))


def _relu_squared(self: nn.Module, x: Tensor) -> Tensor:
    up, down = cast("tuple[Any, Any]", _ungated_projections(self))
    return cast(Tensor, down(relu_squared(up(x))))


class _Plain(Rule):
    candidates = (Candidate("relu_squared", _relu_squared),)

    def fits(self, module: nn.Module) -> bool:
        return _ungated_projections(module) is not None

    def refusal(self, module: nn.Module) -> str | None:
        return _more_than(module, cast("tuple[Any, Any]", _ungated_projections(module)))

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        return (make(2, 3, cast("tuple[Any, Any]", _ungated_projections(module))[0].in_features),)


def _rotate(self: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(q, k, cos, sin, interleaved=self.part.rope.interleaved)


class _Rope(Rule):
    method = "apply_rope"
    candidates = (Candidate("rope", _rotate),)
    differentiable = 2

    def fits(self, module: nn.Module) -> bool:
        return hasattr(module, "apply_rope") and getattr(getattr(module, "part", None), "rope", None) is not None

    def inputs(self, module: Any, make: Make) -> tuple[Any, ...]:
        q, k = make(1, 9, module.num_heads, module.head_dim), make(1, 9, module.num_kv_heads, module.head_dim)
        frequencies = rope_frequencies(module.part.rope.rotary_dim(module.head_dim))
        tables = rope_table(frequencies, 9, interleaved=module.part.rope.interleaved)
        return q, k, *(table.to(q.device) for table in tables)


RULES: tuple[Rule, ...] = (_RMSNorm(), _LayerNorm(), _Gated(), _Plain(), _Rope(), ProjectedAttention())
"""Every kind of layer that is known."""


def unsupported_reason(module: nn.Module) -> str | None:
    """Return why a layer that looks like a known kind is unsupported; ``None`` for all others.

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
