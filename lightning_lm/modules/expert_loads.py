"""Loads of experts over an optimizer step: added up over micro-batches and ranks, handed to the layers if it is taken.

Auxiliary losses of layers are sums over the tokens that count. They are added to the sum that is trained on, which is
divided by what the loss counts (target tokens, pairs, completions), so they are multiplied by the ratio of the two
numbers in the optimizer step before: whatever the objective, a weight is that of a mean over tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_lm.distributed import data_ranks
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.dtypes import accumulation_dtype, to_accumulate
from lightning_lm.models import LayerLoad

__all__ = ["LoadWindow", "StepLoad", "expert_layers"]


class StepLoad(NamedTuple):
    """Load of a layer of experts over all ranks and micro-batches of an optimizer step."""

    counts: Tensor
    """Choices of each expert."""
    tokens: Tensor
    """Number of tokens."""
    dropped: Tensor
    """Choices that were dropped."""
    entropy: Tensor
    """Sum of the entropies of the router's distributions. Nats."""
    loss: Tensor
    """Sum of the auxiliary losses. Nats."""


def expert_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of experts of a model by name.

    Args:
        model: Any module.
    """
    return {name: module for name, module in model.named_modules() if hasattr(module, "end_step")}


class LoadWindow:
    """Loads of all layers since the last optimizer step."""

    def __init__(self) -> None:
        self._sums: dict[nn.Module, Tensor] = {}
        self._ratios: dict[nn.Module, Tensor] = {}

    def add(self, loads: Sequence[LayerLoad], loss: TokenLoss) -> TokenLoss:
        """Count the loads of a micro-batch and return its sums with the auxiliary losses; the likelihood stays.

        Args:
            loads: Reports of the layers.
            loss: Sums of the micro-batch.
        """
        for load in loads:
            sums = torch.cat((to_accumulate(load.counts), load.sums))
            known = self._sums.get(load.layer)
            self._sums[load.layer] = sums if known is None else known + sums
        losses = [x.loss * self._ratio(x, loss.num_tokens).to(x.loss) for x in loads if x.loss is not None]
        return loss._replace(loss_sum=loss.loss_sum + torch.stack(losses).sum()) if losses else loss

    def _ratio(self, load: LayerLoad, num_tokens: Tensor) -> Tensor:
        """Return what the loss counts per token of a layer; in the first step, in the micro-batch itself."""
        known = self._ratios.get(load.layer)
        return num_tokens / load.sums[0].clamp(min=1) if known is None else known

    def close(self, module: nn.Module, trainer: Trainer, num_tokens: Tensor, *, skipped: bool) -> None:
        """Add up over ranks and hand the loads to the layers, unless the step is skipped. Collective.

        Args:
            module: Contains the layers, in the same order on all ranks.
            trainer: Trainer that knows the ranks.
            num_tokens: Divisor of the loss, over all ranks and micro-batches.
            skipped: True if the optimizer step is not taken.
        """
        sums, self._sums = self._sums, {}
        layers: list[Any] = list(expert_layers(module).values())
        if not layers:
            return
        device = next(iter(sums.values())).device if sums else next(module.parameters()).device
        parts = [sums[layer] if layer in sums else self._empty(layer, device) for layer in layers]
        together = torch.cat([*parts, parts[0].new_ones(1)])
        if trainer.world_size > 1:
            # Ranks that share each matrix have the same sums; a strategy may count each of them.
            together = torch.as_tensor(trainer.strategy.reduce(together, reduce_op="sum"))
            together = together * (data_ranks(trainer) / together[-1])
        for layer, found in zip(layers, together[:-1].split([len(part) for part in parts]), strict=True):
            load = StepLoad(found[: layer.num_experts], *found[layer.num_experts :].unbind())
            layer.last_load = load
            if bool((load.tokens > 0) & (num_tokens > 0)):
                self._ratios[layer] = num_tokens / load.tokens
            if not skipped and bool(load.tokens > 0):
                layer.end_step(load.counts)

    def state_dict(self, module: nn.Module) -> dict[str, float]:
        """Return what the loss counted per token of each layer in the last optimizer step.

        Args:
            module: Contains the layers.
        """
        layers = expert_layers(module).items()
        return {name: float(self._ratios[layer]) for name, layer in layers if layer in self._ratios}

    def load_state_dict(self, state: dict[str, float], module: nn.Module, device: torch.device) -> None:
        """Take the state of `state_dict`.

        Args:
            state: Numbers by name of the layer.
            module: Contains the layers.
            device: Device to compute on.
        """
        layers, dtype = expert_layers(module), accumulation_dtype(device)
        self._ratios = {layers[name]: torch.tensor(ratio, dtype=dtype, device=device) for name, ratio in state.items()}

    def _empty(self, layer: Any, device: torch.device) -> Tensor:
        return to_accumulate(torch.zeros(layer.num_experts + len(StepLoad._fields) - 1, device=device))
