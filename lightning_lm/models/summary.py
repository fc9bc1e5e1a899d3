"""Cost of a model: parameters by role, FLOPs per token, and the memory of a training step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from lightning_lm.models.config import ModelConfig
from lightning_lm.models.mixer import AttentionShape, MixerModule
from lightning_lm.models.roles import Role, parameter_roles

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "AttentionShape",
    "MemoryEstimate",
    "ModelDescription",
    "ParameterRow",
    "active_parameters",
    "attention_shapes",
    "cast_bytes",
    "describe",
    "flops_per_token",
    "memory_estimate",
    "parameter_table",
    "readable_bytes",
    "render",
]

_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class ParameterRow:
    """The parameters of one role.

    Args:
        role: Role of the parameters.
        tensors: Number of tensors.
        parameters: Number of parameters.
        share: Fraction of all parameters, from 0 to 1.
        num_bytes: Size in their own type, in bytes.
    """

    role: Role
    tensors: int
    parameters: int
    share: float
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that training needs on one device, roughly.

    Args:
        parameters: Size of the parameters in their own type.
        gradients: Size of the gradients, which have the parameters' type.
        optimizer_states: Size of the optimizer states.
        activations: Size of the activations that are kept for the backward pass.
    """

    parameters: int
    gradients: int
    optimizer_states: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.parameters + self.gradients + self.optimizer_states + self.activations


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Parameters, FLOPs and memory of a model.

    Args:
        rows: The parameters by role.
        context_length: Tokens of a row; ``None`` if unknown.
        flops_per_token: Training FLOPs per token at that length; see `flops_per_token`. ``None`` if not counted.
        memory: Memory of a training step.
        active_parameters: Parameters that a token uses, where there are experts; ``None`` for all.
    """

    rows: tuple[ParameterRow, ...]
    context_length: int | None
    flops_per_token: float | None
    memory: MemoryEstimate
    active_parameters: int | None = None

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(row.parameters for row in self.rows)


def parameter_table(model: nn.Module) -> list[ParameterRow]:
    """Return the parameters of a model by role, in a fixed order, without empty roles.

    A weight that is shared is counted once, under ``embedding`` where it is one.

    Args:
        model: Any module, on any device.
    """
    roles = parameter_roles(model)
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    rows = []
    for role in get_args(Role):
        own = [parameters[name] for name, known in roles.items() if known == role]
        count = sum(parameter.numel() for parameter in own)
        if own:
            rows.append(ParameterRow(role, len(own), count, count / max(total, 1), sum(p.nbytes for p in own)))
    return rows


def flops_per_token(model: nn.Module | ModelConfig, context_length: int, *, causal: bool = False) -> float:
    """Return the floating point operations that training spends on a token, for FLOP budgets and MFU.

    Counted are matrix products, multiplications and additions: the forward pass once, the backward pass twice, without
    recomputation. A weight that is multiplied with counts 2 per token; the embedding is looked up, which is free, but
    the head is a product also where it is tied. Attention adds the scores and the weighted sum of the values,
    ``4 * width * keys`` per layer. ``keys`` is the context length or the window, whichever is shorter: so do published
    MFU numbers and `torch.utils.flop_counter` count, although causality hides half of them.

    Args:
        model: A model, ours or another library's, or a config whose ``vocab_size`` is set.
        context_length: Tokens of a row.
        causal: Count only the keys that a query can see: on average ``(context_length + 1) / 2`` without a window.

    Source:
        Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B; Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = model.build()
    mixers = [module for module in model.modules() if isinstance(module, MixerModule)]
    if mixers:
        mixing = sum(mixer.mixing_flops(context_length, causal=causal) for mixer in mixers)
    else:
        shapes = attention_shapes(model)
        mixing = sum(4.0 * shape.width * shape.keys(context_length, causal=causal) for shape in shapes)
    forward = 2.0 * _multiplied_weights(model) + mixing
    return _FORWARD_AND_BACKWARD * forward


def memory_estimate(
    model: nn.Module,
    tokens: int,
    *,
    states_per_parameter: float = 2.0,
    activation_bytes: int = 4,
    autocast: bool = False,
) -> MemoryEstimate:
    """Return roughly what a training step holds at its peak.

    Activations are taken as twice the output of each linear layer: the output itself, and what is computed from it
    feature by feature (a rotation, an activation, a residual sum). The head is not counted, as the loss never holds all
    logits.

    Args:
        model: A model on any device; the meta device is enough.
        tokens: Tokens of a micro-batch on one device.
        states_per_parameter: Copies the optimizer keeps: 2 for AdamW, 1 for Muon or momentum, 0 for plain SGD.
        activation_bytes: Bytes of an activation: 2 under bf16 autocast.
        autocast: Count with the activations the copies of float32 weights that the backward pass needs.
    """
    trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    roles = _roles_by_weight(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inner = [module for module in linear if roles[id(module.weight)] not in ("head", "embedding")]
    stacks = _expert_stacks(model)
    outputs = sum(module.out_features for module in inner)
    outputs += sum(round(stack.weight.size(0) * stack.active_share) * stack.weight.size(1) for stack in stacks)
    copies = cast_bytes(module.weight for module in (*inner, *stacks)) if autocast and tokens else 0
    return MemoryEstimate(
        parameters=sum(parameter.nbytes for parameter in model.parameters()),
        gradients=trainable,
        optimizer_states=round(states_per_parameter * trainable),
        activations=2 * outputs * tokens * activation_bytes + copies,
    )


def cast_bytes(weights: Iterable[Tensor]) -> int:
    """Return the size of the copies that autocast makes of float32 weights, one of each, in two bytes a number.

    Args:
        weights: Weights of linear layers.
    """
    copied = {id(weight): weight for weight in weights if weight.dtype == torch.float32}
    return 2 * sum(weight.numel() for weight in copied.values())


def describe(model: nn.Module, context_length: int, *, rows: int = 1) -> ModelDescription:
    """Return everything a summary of a model shows.

    Args:
        model: A model on any device.
        context_length: Tokens of a row.
        rows: Rows of a micro-batch on one device.
    """
    return ModelDescription(
        rows=tuple(parameter_table(model)),
        context_length=context_length,
        flops_per_token=flops_per_token(model, context_length),
        memory=memory_estimate(model, rows * context_length),
        active_parameters=active_parameters(model),
    )


def active_parameters(model: nn.Module) -> int:
    """Return the number of parameters that a token uses: of a stack of experts, the share that it is multiplied with.

    Args:
        model: Any module; without experts these are all parameters.
    """
    shares = _active_shares(model)
    return round(sum(weight.numel() * shares.get(id(weight), 1.0) for weight in model.parameters()))


def render(description: ModelDescription) -> "Table":
    """Return a description as a table for a terminal.

    Args:
        description: Result of `describe`.
    """
    from rich.table import Table

    title = f"{_short(description.num_parameters).strip()} parameters"
    if description.active_parameters not in (None, description.num_parameters):
        title += f", {_short(description.active_parameters or 0).strip()} of them active per token"
    table = Table(title=title, caption=_caption(description))
    table.add_column("role")
    for name in ("tensors", "parameters", "share", "memory"):
        table.add_column(name, justify="right")
    for row in description.rows:
        table.add_row(
            row.role, str(row.tensors), _short(row.parameters), f"{row.share:.1%}", readable_bytes(row.num_bytes)
        )
    return table


def _caption(description: ModelDescription) -> str:
    memory, flops = description.memory, description.flops_per_token
    parts = {"parameters": memory.parameters, "gradients": memory.gradients, "optimizer": memory.optimizer_states}
    if flops is None:
        first = "FLOPs not counted: the module takes no token ids, or the length of its rows is unknown"
    else:
        first = f"{_short(flops)}FLOPs per trained token at context {description.context_length}"
    total = readable_bytes(memory.total)
    if memory.activations:
        parts["activations"] = memory.activations
    else:
        total += " without activations"
    return f"{first}\nabout {total}: {', '.join(f'{name} {readable_bytes(size)}' for name, size in parts.items())}"


def _multiplied_weights(model: nn.Module) -> float:
    """Count the weights that a token is multiplied with: also an embedding, where a head shares it.

    A module whose weights only some tokens meet, such as a stack of experts, says so by ``active_share``.
    """
    roles = _roles_by_weight(model)
    own = [p for p in model.parameters() if roles[id(p)] not in ("embedding", "vector")]
    tied = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and roles[id(m.weight)] == "embedding"]
    shares = _active_shares(model)
    return sum(weight.numel() * shares.get(id(weight), 1.0) for weight in own + tied)


def _expert_stacks(model: nn.Module) -> list[Any]:
    """Return the modules whose ``weight`` is a stack of matrices, [stack, out, in], of which a token meets a share."""
    return [module for module in model.modules() if hasattr(module, "active_share")]


def _active_shares(model: nn.Module) -> dict[int, float]:
    """Return the share of a parameter that a token meets, by its identity; those that it meets whole are left out."""
    return {id(p): float(s.active_share) for s in _expert_stacks(model) for p in s.parameters(recurse=False)}


def _roles_by_weight(model: nn.Module) -> dict[int, Role]:
    parameters = dict(model.named_parameters())
    return {id(parameters[name]): role for name, role in parameter_roles(model).items()}


def attention_shapes(model: nn.Module) -> list[AttentionShape]:
    """Return the shape of each attention layer, of ours and of models of transformers, which say it in their config.

    Args:
        model: Any module; without known attention there is nothing to return.
    """
    own = [module for module in model.modules() if isinstance(module, MixerModule)]
    if own:
        return [module.attention_shape for module in own if module.attention_shape is not None]
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads, layers = (getattr(config, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
        if heads and layers:
            mixed = getattr(config, "is_heterogeneous", False)  # its layers differ, each has a config
            each = list(config.per_layer_config) if mixed else [config] * layers
            sizes = [getattr(layer, "head_dim", None) or layer.hidden_size // heads for layer in each]
            return [AttentionShape(heads * size, heads) for size in sizes]
    return []


def _short(number: float | int) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} "


def readable_bytes(number: int) -> str:
    """Return a number of bytes with one decimal and a binary unit."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
