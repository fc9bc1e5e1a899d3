"""Overview of a model before training: parameters by role, FLOPs per token, memory."""

from typing import Any

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary

from lightning_lm.callbacks.batches import model_context, row_length, rows_per_device
from lightning_lm.callbacks.flops import training_flops_per_token
from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.models.summary import ModelDescription, active_parameters, memory_estimate, parameter_table, render
from lightning_lm.parts import Limit, check_numbers

__all__ = ["LMSummary"]


class LMSummary(LeanHooks, ModelSummary):
    """Print parameters by role, training FLOPs per token and an estimate of memory, once at fit start.

    Weight decay, optimizer routing and FLOP counts follow from the roles of parameters in this table; it works for any
    module, and replaces Lightning's summary by layer. The memory is that of one device
    before sharding, for a micro-batch of the datamodule. FLOPs and activations are counted for modules that take token
    ids, if the length of a row is known; for others the table says so.

    Args:
        context_length: Tokens in a row, for FLOPs and activations; by default that of the datamodule or of the model's
            config.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import LMSummary
        >>> trainer = Trainer(callbacks=[LMSummary()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, context_length: int | None = None) -> None:
        super().__init__()
        check_numbers({"context_length": Limit.COUNT}, {"context_length": context_length})
        self._context_length = context_length

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on rank 0; counting FLOPs may need a forward pass, which every rank makes."""
        rows = row_length(trainer, pl_module)
        length = self._context_length or rows or model_context(pl_module)
        flops = None if length is None else training_flops_per_token(pl_module, length)
        if not trainer.is_global_zero:
            return
        memory = memory_estimate(
            pl_module,
            0 if flops is None else (self._context_length or rows or 0) * rows_per_device(trainer),
            states_per_parameter=_states_per_parameter(trainer),
            activation_bytes=2 if "16" in str(trainer.precision) else 4,
            autocast=str(trainer.precision).endswith("mixed"),
        )
        table = tuple(parameter_table(pl_module))
        description = ModelDescription(
            rows=table,
            context_length=length,
            flops_per_token=flops,
            memory=memory,
            active_parameters=active_parameters(pl_module),
        )
        rich.get_console().print(render(description))


def _states_per_parameter(trainer: Trainer) -> float:
    groups: list[dict[str, Any]] = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    sizes: list[int] = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    copies = sum(_states(group) * size for group, size in zip(groups, sizes, strict=True))
    return copies / max(1, sum(sizes))


def _states(group: dict[str, Any]) -> int:
    """Count the tensors that an optimizer keeps per parameter: two with betas (Adam's kin), one with momentum."""
    return 2 if "betas" in group else 1 if group.get("momentum") else 0
