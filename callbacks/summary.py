"""What is about to be trained: parameters by role, FLOPs per token, memory."""

from typing import NamedTuple

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from rich.table import Table
from torch import nn

from lightning_lm.callbacks.flops import training_flops_per_token
from lightning_lm.callbacks.readable import short
from lightning_lm.models.roles import parameter_roles

__all__ = ["LMSummary"]


class _Row(NamedTuple):
    role: str
    tensors: int
    parameters: int


class LMSummary(ModelSummary):
    """Print parameters by role, training FLOPs per token and the memory they need, once at fit start.

    Weight decay, optimizer routing and FLOP counts follow from a parameter's role, so this table shows what they will
    do; it works for any module. It takes the place of Lightning's summary by layer. Memory is what weights, gradients
    and optimizer state take on each device before sharding; activations come on top.

    Args:
        context_length: Tokens in a row, for the FLOPs of attention. Left out, ``trainer.datamodule.context_length`` is
            asked; without either no FLOPs are shown.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import LMSummary
        >>> trainer = Trainer(callbacks=[LMSummary()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, context_length: int | None = None) -> None:
        super().__init__()
        self._context_length = context_length

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on rank 0; FLOPs may need a forward pass, which every rank makes."""
        length = self._context_length or getattr(trainer.datamodule, "context_length", None)  # type: ignore[attr-defined]
        flops = training_flops_per_token(pl_module, length) if length else 0.0
        if not trainer.is_global_zero:
            return
        rows = _by_role(pl_module)
        model = getattr(pl_module, "model", pl_module)
        facts = _facts(trainer, pl_module, rows)
        if flops:
            facts.insert(0, f"{short(flops)} training FLOPs per token at context {length:,}")
        rich.get_console().print(_table(type(model).__name__, rows), *facts, sep="\n", highlight=False)


def _by_role(module: nn.Module) -> list[_Row]:
    parameters = dict(module.named_parameters())
    sizes: dict[str, list[int]] = {}
    for name, role in parameter_roles(module).items():
        sizes.setdefault(role, []).append(parameters[name].numel())
    return [_Row(role, len(numbers), sum(numbers)) for role, numbers in sizes.items()]


def _table(title: str, rows: list[_Row]) -> Table:
    total = sum(row.parameters for row in rows)
    table = Table(title=f"{title}: {short(total)} parameters", title_justify="left", show_footer=True, box=None)
    table.add_column("role", footer="total")
    table.add_column("tensors", footer=f"{sum(row.tensors for row in rows):,}", justify="right")
    table.add_column("parameters", footer=f"{total:,}", justify="right")
    table.add_column("share", footer="", justify="right")
    for row in sorted(rows, key=lambda row: -row.parameters):
        table.add_row(row.role, f"{row.tensors:,}", f"{row.parameters:,}", f"{row.parameters / max(total, 1):.1%}")
    return table


def _facts(trainer: Trainer, module: nn.Module, rows: list[_Row]) -> list[str]:
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    frozen = sum(row.parameters for row in rows) - sum(parameter.numel() for parameter in trainable)
    parts = {
        "weights": sum(_num_bytes(parameter) for parameter in module.parameters()),
        "gradients": sum(_num_bytes(parameter) for parameter in trainable),
        "optimizer state": sum(
            _moments(group) * _num_bytes(parameter)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ),
    }
    listed = ", ".join(f"{name} {short(size)}B" for name, size in parts.items())
    memory = f"{short(sum(parts.values()))}B of memory before activations ({listed})"
    return [memory, *([f"{frozen:,} parameters are frozen"] if frozen else [])]


def _num_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _moments(group: dict[str, object]) -> int:
    """Count the tensors that an optimizer keeps per parameter: two with betas (Adam's kin), one with momentum."""
    return 2 if "betas" in group else 1 if group.get("momentum") else 0
