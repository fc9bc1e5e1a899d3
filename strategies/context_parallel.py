"""Context parallelism: the tokens of each row are sharded over ranks, for rows that do not fit on one device."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.attention import Documents
from lightning_lm.functional.context_parallel import context_parallel_attention, shard_sequence
from lightning_lm.functional.cross_entropy import MeasuredLoss, TokenLoss
from lightning_lm.models.attention import Attention, SelfAttention
from lightning_lm.models.experts.moe import MixtureOfExperts
from lightning_lm.models.sink_attention import SinkSelfAttention
from lightning_lm.modules.token_losses import ImitationLoss, TokenLossPart, next_token_inputs, next_token_targets
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.strategies.failure_reports import _ReportingStrategy
from lightning_lm.strategies.unfrozen import _AveragesUnfrozen
from lightning_lm.types import IGNORE_INDEX

__all__ = ["ContextParallelStrategy"]


class ContextParallelStrategy(_ReportingStrategy, _AveragesUnfrozen):
    """Context parallelism: neighbouring ranks each have a shard of the tokens of a row, and all weights.

    Activations shrink by the context-parallel size; keys and values are all-gathered one layer at a time.
    For modules whose ``loss`` sums over tokens (`PretrainModule`, `SFTModule`) and models of this package; weights,
    losses and checkpoints are those of one process. Validation and callbacks see whole rows on every rank.

    Args:
        context_parallel_size: Ranks over which a row is sharded; divides the number of ranks. "auto" for all ranks.
        **settings: For `DDPStrategy`.

    Raises:
        ConfigurationError: If the size does not divide the number of ranks, or the module or model cannot be cut.

    Source:
        Grattafiori et al. 2024 (Llama 3), arXiv:2407.21783, section 3.3.2.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = ContextParallelStrategy(context_parallel_size=2)
        >>> trainer = Trainer(strategy=strategy, devices=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(self, context_parallel_size: int | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        check_numbers({"context_parallel_size": Limit.COUNT}, {"context_parallel_size": context_parallel_size})
        self.context_parallel_size = context_parallel_size
        self.device_mesh: DeviceMesh | None = None
        self._shared: _SharedRows | None = None

    def setup_environment(self) -> None:
        """Form the mesh; the ranks of a row are neighbours."""
        super().setup_environment()
        size = self._row_ranks
        if size < 1 or self.world_size % size:
            raise ConfigurationError(
                f"context_parallel_size={size} does not divide the {self.world_size} ranks; use a divisor of "
                f"{self.world_size}, or change devices or num_nodes."
            )
        shape, names = (self.world_size // size, size), ("data_parallel", "context_parallel")
        self.device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def setup(self, trainer: Trainer) -> None:
        """Let the module's loss and attention work on shared rows, then set up as ever."""
        assert self.lightning_module is not None
        self._shared = _SharedRows(self.lightning_module, self._group("context_parallel"))
        super().setup(trainer)

    def teardown(self) -> None:
        """Give the module back as it was."""
        if self._shared is not None:
            self._shared.give_back()
        self._shared = None
        super().teardown()

    def generation_context(self, module: LightningModule | nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context in which attention sees the rows that it is given as whole ones: every rank has all weights.

        Args:
            module: The module in training.
        """
        return contextlib.nullcontext() if self._shared is None else self._shared.whole_rows()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Ranks of a context-parallel group read the same rows."""
        size = self._row_ranks
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the ranks that read different rows, so that nothing counts twice."""
        return super().reduce(tensor, group or self._group("data_parallel"), reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return a decision of all ranks together. Collective: call on all ranks."""
        votes = torch.tensor(int(decision), device=self.root_device)
        distributed.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    @property
    def _row_ranks(self) -> int:
        return self.world_size if self.context_parallel_size == "auto" else self.context_parallel_size

    def _group(self, axis: str) -> distributed.ProcessGroup:
        assert self.device_mesh is not None
        return self.device_mesh.get_group(axis)


class _SharedRows:
    """A module whose loss cuts each row, and whose attention gathers what it needs of the rest."""

    def __init__(self, module: LightningModule, group: distributed.ProcessGroup) -> None:
        self._module, self._group = module, group
        self._mixers = _mixers(module)
        self._loss = _token_loss(module)
        self._document_ids: Tensor | None = None
        module.loss = self._shared_loss  # type: ignore[assignment]
        for mixer in self._mixers:
            mixer.attend = functools.partial(self._attend, mixer.part)  # type: ignore[method-assign]

    def give_back(self) -> None:
        self._module.loss = self._loss  # type: ignore[assignment]
        for mixer in self._mixers:
            del mixer.attend

    @contextlib.contextmanager
    def whole_rows(self) -> Iterator[None]:
        shared = [(mixer, vars(mixer).pop("attend")) for mixer in self._mixers]
        try:
            yield
        finally:
            for mixer, attend in shared:
                mixer.attend = attend  # type: ignore[method-assign]

    def _shared_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> TokenLoss | MeasuredLoss:
        """Return the sums over whole rows, whose gradient is that of this rank's tokens times the number of ranks.

        The average over all ranks that `DistributedDataParallel` takes then is the average over rows.
        """
        rows = _padded(batch, 2 * self._group.size())
        self._document_ids = rows.pop("document_ids", None)
        found = self._loss(model, _as_batch({name: shard_sequence(value, self._group) for name, value in rows.items()}))
        if not isinstance(found, MeasuredLoss):
            return self._reduced(found)
        entropy_sum, num_correct = self._over_ranks(found.entropy_sum), self._over_ranks(found.num_correct)
        return MeasuredLoss(self._reduced(found.loss), entropy_sum, num_correct)

    def _reduced(self, loss: TokenLoss) -> TokenLoss:
        nll_sum, num_tokens = self._over_ranks(loss.nll_sum), self._over_ranks(loss.num_tokens)
        return TokenLoss(loss.loss_sum * self._group.size(), nll_sum, num_tokens)

    def _over_ranks(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        distributed.all_reduce(total, group=self._group)
        return total

    def _attend(self, part: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """Attend to whole rows; the mask of this rank's tokens alone is of no use."""
        return context_parallel_attention(
            query,
            key,
            value,
            group=self._group,
            document_ids=self._document_ids,
            window=part.window,
            softcap=part.softcap,
            scale=part.scale,
        )


def _padded(batch: Mapping[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """Return inputs, their positions and targets, with tokens that nothing depends on after each row."""
    inputs = next_token_inputs(batch)
    if "prefix_lengths" in inputs:
        raise ConfigurationError("ContextParallelStrategy attends causally, and the batch has prefix_lengths; use ddp.")
    ids = inputs["input_ids"]
    documents = Documents(ids=inputs.get("document_ids", torch.zeros_like(ids)), runs=())
    inputs.setdefault("position_ids", documents.positions())
    padding = (0, -ids.size(1) % multiple)
    rows = {name: F.pad(value, padding) for name, value in inputs.items()}
    return {**rows, "targets": F.pad(next_token_targets(batch), padding, value=IGNORE_INDEX)}


def _as_batch(local: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what a loss does to a batch: it drops the last input and the first label."""
    targets = local.pop("targets")
    return {**{name: F.pad(value, (0, 1)) for name, value in local.items()}, "labels": F.pad(targets, (1, 0))}


def _mixers(module: LightningModule) -> list[SelfAttention]:
    mixers = [
        part for part in module.modules() if isinstance(part, SelfAttention) and not isinstance(part, SinkSelfAttention)
    ]
    blocks = [part for part in module.modules() if hasattr(part, "mixer")]
    strangers = {type(block.mixer).__name__ for block in blocks if block.mixer not in mixers}
    if strangers or not mixers:
        raise ConfigurationError(
            "ContextParallelStrategy can share rows in layers of Attention only, and found "
            f"{sorted(strangers) or 'none'}. Use a model of lightning_lm.models, or another strategy."
        )
    if any(isinstance(part, MixtureOfExperts) for part in module.modules()):
        raise ConfigurationError(
            "ContextParallelStrategy does not add up the loads of experts over the ranks that share a row. Train a "
            "model that has MoE layers with another strategy."
        )
    if not all(mixer.is_causal for mixer in mixers):
        raise ConfigurationError("ContextParallelStrategy attends causally; Attention(causal=False) needs another.")
    if any(mixer.part.dropout for mixer in mixers):
        raise ConfigurationError("ContextParallelStrategy cannot drop attention weights; set Attention(dropout=0.0).")
    return mixers


def _token_loss(module: LightningModule) -> TokenLossPart | ImitationLoss:
    loss = getattr(module, "loss", None)
    if not isinstance(loss, TokenLossPart | ImitationLoss):
        raise ConfigurationError(
            "ContextParallelStrategy cuts rows, so the loss must be a sum over tokens, and "
            f"{type(module).__name__} has no such 'loss'. Use it with PretrainModule or SFTModule, another strategy "
            "for this one."
        )
    return loss
