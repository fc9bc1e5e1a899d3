"""The rule for attention layers that hold their projections, as in ``transformers``: rotation and scores by kernels.

Such a layer has one method for everything, and takes its rotation from a function of its module and its scores from a
registry: neither can be exchanged for one model only. So the whole method is, and where a call is anything but plain
causal attention over its own tokens (a mask of all pairs for packed or padded rows, a cache that holds tokens, more to
return), it goes to the layer's own.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lm.kernels.attention import attention
from lightning_lm.kernels.rope import rope
from lightning_lm.kernels.swap_parts import Candidate, Make, Rule

__all__ = ["ProjectedAttention"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
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
    return "its cache holds tokens" if _holds_tokens(self, _cache_of(options)) else None


def _project_turn_and_attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend causally to the tokens that are given, as the layer does when `_falls_back` finds nothing more."""
    shape = *hidden_states.shape[:-1], -1, self.head_dim
    q, k, v = (getattr(self, name)(hidden_states).view(shape) for name in _PROJECTIONS[:3])
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


def _holds_tokens(layer: Any, cache: Any) -> bool:
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

    candidates = (Candidate("rope and attention", _project_turn_and_attend, _falls_back),)

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module is of this kind."""
        parts = all(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)
        return parts and all(hasattr(module, name) for name in ("head_dim", "scaling", "config", "layer_idx"))

    def refusal(self, module: nn.Module) -> str | None:
        """Return why a module of this kind cannot be exchanged, if it is known without trying."""
        layer = cast(Any, module)
        chosen = getattr(layer.config, "_attn_implementation", None)
        if chosen != "sdpa":
            why = "which is given a mask of all pairs" if chosen == "eager" else "which is left alone"
            return f"its config asks for {chosen} attention, {why}; attn_implementation='sdpa' can be exchanged"
        if getattr(layer, "attention_dropout", 0.0):
            return f"dropout={layer.attention_dropout} of attention weights"
        return None if getattr(layer, "is_causal", True) else "it attends to later tokens too"

    def inputs(self, module: nn.Module, make: Make) -> tuple[Any, ...]:
        """Return inputs to try the method with: tokens, their cosines and sines, no mask."""
        layer = cast(Any, module)
        hidden = make(2, 7, layer.q_proj.in_features)
        angles = make(2, 7, layer.head_dim // 2).repeat(1, 1, 2)
        return hidden, (angles.cos(), angles.sin()), None
