"""The experts of a layer as stacks of matrices, ``[experts, out, in]``: one product for all of them."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels.grouped_linear import grouped_linear
from lightning_lm.models.ffn import ACTIVATIONS, FFN, GLU, MLP
from lightning_lm.models.init import residual_output

__all__ = ["ExpertStack", "StackedLinear", "build_experts"]


class StackedLinear(nn.Module):
    """A linear layer for each expert.

    Args:
        num_experts: Number of layers.
        in_features: Features of an input row.
        out_features: Features of an output row.
        bias: Give the layers biases; they lie end to end, ``[experts * out]``.
        active_share: Share of the layers that a token is multiplied with, from 0 to 1.
    """

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, *, bias: bool = False, active_share: float = 1.0
    ) -> None:
        super().__init__()
        self.active_share = active_share
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts * out_features)) if bias else None

    def forward(
        self, rows: Float[Tensor, "rows in_features"], counts: Int[Tensor, " experts"]
    ) -> Float[Tensor, "rows out_features"]:
        """Multiply each row with the matrix of its expert.

        Args:
            rows: In the order of the experts.
            counts: Rows of each expert.
        """
        return grouped_linear(rows, self.weight, counts)

    def row_biases(self, counts: Int[Tensor, " experts"]) -> Float[Tensor, "rows out_features"] | None:
        """Return the bias of each row's expert.

        Args:
            counts: Rows of each expert.
        """
        if self.bias is None:
            return None
        return self.bias.view(len(counts), -1).repeat_interleave(counts, 0)


class ExpertStack(nn.Module):
    """Experts that are feed-forward layers: ``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))``.

    Args:
        part: `GLU` or `MLP` of one expert.
        d_model: Features of the residual stream.
        num_experts: Number of experts.
        active_share: Share of the experts that a token goes to, from 0 to 1.
    """

    def __init__(self, part: GLU | MLP, d_model: int, num_experts: int, *, active_share: float) -> None:
        super().__init__()
        with torch.device("meta"):
            hidden_size: int = part.build(d_model).get_submodule("down").in_features  # type: ignore[assignment]
        options: dict[str, Any] = {"bias": part.bias, "active_share": active_share}
        self.gate = StackedLinear(num_experts, d_model, hidden_size, **options) if isinstance(part, GLU) else None
        self.up = StackedLinear(num_experts, d_model, hidden_size, **options)
        self.down = residual_output(StackedLinear(num_experts, hidden_size, d_model, **options))
        self.activation = ACTIVATIONS[part.activation]

    def forward(
        self,
        rows: Float[Tensor, "rows d_model"],
        counts: Int[Tensor, " experts"],
        weights: Float[Tensor, "rows"],
    ) -> Float[Tensor, "rows d_model"]:
        """Return each row's output of its expert, times its weight.

        Args:
            rows: In the order of the experts.
            counts: Rows of each expert.
            weights: Factor on the output of each row.
        """
        up = _plus(self.up(rows, counts), self.up.row_biases(counts))
        if self.gate is None:
            hidden = self.activation(up)
        else:
            hidden = self.gated(_plus(self.gate(rows, counts), self.gate.row_biases(counts)), up)
        factor = weights[:, None].to(hidden.dtype)
        biases = self.down.row_biases(counts)
        # The weight is a factor of the narrower side: the layer is linear.
        out: Tensor = self.down(hidden * factor, counts)
        return out if biases is None else out + biases.to(out.dtype) * factor

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the features between the projections, [rows, hidden].

        Args:
            gate: Factor that is activated.
            up: The other factor.
        """
        return self.activation(gate) * up


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def build_experts(part: FFN, d_model: int, num_experts: int, *, active_share: float) -> nn.Module:
    """Return the experts of a layer, with ``forward(rows, counts, weights)``.

    Args:
        part: One expert; a part of another kind than `GLU` and `MLP` has ``build_experts`` of its own, which takes the
            other arguments.
        d_model: Features of the residual stream.
        num_experts: Number of experts.
        active_share: Share of the experts that a token goes to, from 0 to 1.

    Raises:
        ConfigurationError: If a part cannot be stacked.
    """
    own: Any = getattr(part, "build_experts", None)
    if own is not None:
        module: nn.Module = own(d_model, num_experts, active_share=active_share)
        return module
    if type(part) in (GLU, MLP):
        return ExpertStack(part, d_model, num_experts, active_share=active_share)  # type: ignore[arg-type]
    raise ConfigurationError(
        f"Experts of {type(part).__name__} cannot be stacked. Use GLU or MLP, or give the part a method "
        "build_experts(d_model, num_experts, active_share)."
    )
