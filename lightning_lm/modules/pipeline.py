"""Pretraining with the layers of the model sharded over ranks, one stage each."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_lm._lightning import trainer_of
from lightning_lm.data.batches import completed
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.models import ModelConfig, Transformer
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.base import seed_generator
from lightning_lm.modules.expert_loads import expert_layers
from lightning_lm.modules.gradient_normalization import gradient_norm
from lightning_lm.modules.pretrain import PretrainModule
from lightning_lm.modules.token_losses import CrossEntropy, TokenLossPart, next_token_inputs, next_token_targets
from lightning_lm.optim import AdamW, Cosine, OptimizerPart, Schedule, SkipRule
from lightning_lm.parts import Limit, Part, check_numbers
from lightning_lm.types import IGNORE_INDEX

__all__ = ["GPipe", "OneForwardOneBackward", "PipelineModule", "PipelineSchedule"]

_AUTOMATIC = "epoch_loop.automatic_optimization.optim_progress"
_MANUAL = "epoch_loop.manual_optimization.optim_step_progress"
"""Keys of a checkpoint's step counter in automatic and in manual optimization."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineSchedule(Part, limits={"micro_batches": Limit.COUNT}):
    """Base of the orders in which stages work on micro-batches."""

    micro_batches: int = 4
    """Equal parts of a batch that are on their way together. The more there are, the less a stage waits."""

    def build(self, stage: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """Return a schedule of `torch.distributed.pipelining` that adds up gradients and divides them by nothing."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPipe(PipelineSchedule):
    """All forward passes, then all backward passes: the activations of every micro-batch are kept.

    Source:
        Huang et al. 2018, arXiv:1811.06965, section 2.2.
    """

    def build(self, stage: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """Return a schedule of `torch.distributed.pipelining` that adds up gradients and divides them by nothing."""
        from torch.distributed.pipelining import ScheduleGPipe

        return ScheduleGPipe(stage, self.micro_batches, loss, scale_grads=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneForwardOneBackward(PipelineSchedule):
    """A backward pass as soon as there can be one: activations of as many micro-batches as there are stages are kept.

    Source:
        Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1 (1F1B, "PipeDream-Flush").
    """

    def build(self, stage: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """Return a schedule of `torch.distributed.pipelining` that adds up gradients and divides them by nothing."""
        from torch.distributed.pipelining import Schedule1F1B

        if self.micro_batches < stage.num_stages:
            raise ConfigurationError(
                f"OneForwardOneBackward(micro_batches={self.micro_batches}) is too few for {stage.num_stages} stages; "
                f"use at least {stage.num_stages}, or GPipe."
            )
        return Schedule1F1B(stage, self.micro_batches, loss, scale_grads=False)


class PipelineModule(PretrainModule):
    """`PretrainModule` for `PipelineStrategy`: each rank holds and trains some of the layers.

    A batch of the data is one optimizer step, cut into micro-batches that pass through the stages one after the other;
    they take the place of ``accumulate_grad_batches``. Gradients are those of the sum over target tokens divided by
    their number, over all pipelines; checkpoints hold the whole model under its ordinary names, so that
    `PretrainModule` and any number of stages can load them. Each rank makes the whole model on its CPU before it keeps
    its own layers.

    Args:
        model: Model to train: a config, built once the tokenizer is known, or a module. Embeddings must not be tied.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        loss: Loss that is summed over the target tokens.
        pipeline: The order of work, and the number of micro-batches.
        gradient_clip_val: Largest 2-norm of all gradients together; by default the Trainer's setting. Unitless.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.

    Raises:
        ConfigurationError: If the model cannot be cut, or the Trainer has another strategy.

    Example:
        >>> from lightning_lm.models import TransformerConfig
        >>> module = PipelineModule(TransformerConfig(vocab_size=50, d_model=16, num_layers=2), pipeline=GPipe())
    """

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        optimizer: OptimizerPart = AdamW(),
        schedule: Schedule = Cosine(warmup=0.01),
        loss: TokenLossPart = CrossEntropy(),
        pipeline: PipelineSchedule = OneForwardOneBackward(),
        gradient_clip_val: float | None = None,
        skip: SkipRule | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(
            model,
            optimizer=optimizer,
            schedule=schedule,
            loss=loss,
            skip=skip,
            activation_checkpointing=activation_checkpointing,
        )
        self.automatic_optimization = False
        check_numbers({"gradient_clip_val": Limit.NON_NEGATIVE}, {"gradient_clip_val": gradient_clip_val})
        self.pipeline, self.gradient_clip_val = pipeline, gradient_clip_val
        self._schedules: dict[tuple[Any, ...], Any] = {}
        self._losses: list[TokenLoss] = []
        self._scale = 1.0
        self._place = _Place(0, 1)

    def configure_model(self) -> None:
        """Build the model, and keep this rank's part of it where there is a Trainer."""
        before = self._configured
        super().configure_model()
        if before or trainer_of(self) is None:
            return
        if expert_layers(self.model):
            raise ConfigurationError(
                "PipelineModule does not add up the loads of experts over its stages. Train a model that has "
                "MoE layers with PretrainModule and another strategy."
            )
        strategy: Any = self.trainer.strategy
        if not hasattr(strategy, "stage_index"):
            raise ConfigurationError(
                f"PipelineModule needs PipelineStrategy, and the Trainer has {type(strategy).__name__}. Give "
                "strategy=PipelineStrategy(), or train with PretrainModule."
            )
        self._place = _Place(strategy.stage_index, strategy.num_stages)
        keep_stage(cast(Transformer, self.model), self._place)

    # --- training ---

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Take one optimizer step, and return the mean loss over the batch's target tokens, detached."""
        seed_generator(self.device, self._seed or 0, self.global_rank, self.trainer.global_step, 0)
        batch = completed(batch)
        nothing = torch.zeros((), dtype=torch.float64, device=self.device)
        one = TokenLoss(torch.ones((), device=self.device), nothing, nothing.long())
        positions = batch["labels"].numel() // self.pipeline.micro_batches
        self._scale = float(self._window.add(one, positions=max(1, positions), trainer=self.trainer))
        sums = self._through_all_stages(batch, backward=True)
        self._window.add(sums, positions=positions, trainer=self.trainer)
        optimizer: Any = self.optimizers()
        self._strategy.average_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return (sums.nll_sum / sums.num_tokens.clamp(min=1)).float()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradients exact, measure and clip them, and drop them if the step is to be skipped."""
        super().on_before_optimizer_step(optimizer)
        clip = self._strategy.clip
        limit = self.gradient_clip_val if clip is None or self.gradient_clip_val is not None else clip.value
        if limit is None:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.gradient_clip_val is None and clip.by_value:
            torch.nn.utils.clip_grad_value_(parameters, limit)
            return
        norm = self._grad_norm
        if norm is None:
            norm = gradient_norm(optimizer, self.trainer.strategy)
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def evaluate_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``nll_sum``, ``num_tokens`` and ``target_ids`` of a batch, the same on all stages."""
        batch = completed(batch)
        with torch.no_grad():
            sums = self._through_all_stages(batch, backward=False)
        return {"nll_sum": sums.nll_sum, "num_tokens": sums.num_tokens, "target_ids": next_token_targets(batch)}

    def _through_all_stages(self, batch: Mapping[str, Tensor], *, backward: bool) -> TokenLoss:
        """Run a batch, and return its sums, which the last stage tells the others."""
        rows = _whole_micro_batches(batch, self.pipeline.micro_batches)
        inputs = next_token_inputs(rows)
        self._losses = []
        schedule = self._schedule_for(inputs["input_ids"], backward=backward)
        run = schedule.step if backward else schedule.eval
        first = (inputs["input_ids"],) if self._place.first else ()
        target = rows["labels"] if self._place.last else None
        run(*first, target=target, losses=[] if self._place.last else None, return_outputs=False, **inputs)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for loss in self._losses:
            sums += torch.stack((loss.nll_sum.double(), loss.num_tokens.double()))
        distributed.broadcast(sums, group=self._strategy.pipeline_group, group_src=self._place.num_stages - 1)
        return TokenLoss(sums[0].float(), sums[0], sums[1].long())

    @property
    def _strategy(self) -> Any:
        return self.trainer.strategy

    def _schedule_for(self, input_ids: Tensor, *, backward: bool) -> Any:
        """Return the schedule of a shape; its buffers are made once."""
        key = (*input_ids.shape, backward)
        if key not in self._schedules:
            from torch.distributed.pipelining import PipelineStage  # heavy, and needed by few runs

            rows, length = input_ids.size(0) // self.pipeline.micro_batches, input_ids.size(1)
            width = cast(Transformer, self.model).config.d_model
            dtype = next(self.model.parameters()).dtype
            features = torch.empty(rows, length, width, dtype=dtype, device="meta", requires_grad=backward)
            arriving = input_ids.new_empty(rows, length, device="meta") if self._place.first else features
            stage = PipelineStage(
                _Stage(cast(Transformer, self.model)),
                self._place.stage,
                self._place.num_stages,
                self.device,
                input_args=arriving,
                output_args=features,
                group=self._strategy.pipeline_group,
            )
            self._schedules[key] = self.pipeline.build(stage, self._micro_batch_loss)
        return self._schedules[key]

    def _micro_batch_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scaled sum over a micro-batch's target tokens, on the last stage."""
        batch = {"input_ids": labels, "labels": labels}  # the features are there: inputs are of no use
        loss = self.loss(_Known(features, cast(Transformer, self.model)), batch)
        self._losses.append(loss)
        return loss.loss_sum * self._scale

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count the steps also where a Trainer that optimizes automatically looks for them."""
        super().on_save_checkpoint(checkpoint)
        loop = checkpoint["loops"]["fit_loop"]
        loop[_AUTOMATIC]["optimizer"]["step"] = copy.deepcopy(loop[_MANUAL])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this stage's weights from the whole model's; the rest as ever."""
        own = self.state_dict()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        super().on_load_checkpoint(checkpoint)
        loop = checkpoint["loops"]["fit_loop"]
        loop[_MANUAL] = copy.deepcopy(loop[_AUTOMATIC]["optimizer"]["step"])


class _Place(NamedTuple):
    stage: int
    num_stages: int

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.num_stages - 1


class _Elsewhere(nn.Module):
    """Stands where another rank has a layer, so that the names of the others stay as they are."""

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return x


class _Arriving(nn.Module):
    """Stands where the first rank has the embedding, and gives what has come from the stage before."""

    features: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor | None:
        return self.features


class _Stage(nn.Module):
    """Forward pass of one stage: hidden states of the stage before in, hidden states for the next one out."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        arriving: Tensor,
        *,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        if isinstance(self.model.embed, _Arriving):
            self.model.embed.features = arriving
        return self.model.hidden(input_ids, position_ids=position_ids, document_ids=document_ids)


class _Known(nn.Module):
    """A language model whose features have been computed."""

    def __init__(self, features: Tensor, model: Transformer) -> None:
        super().__init__()
        self.features, self.head, self.logit_softcap = features, model.head, model.logit_softcap

    def hidden(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        return self.features


def keep_stage(model: Transformer, place: _Place) -> None:
    """Leave of a model only one stage's layers, in place; the names of their parameters do not change.

    Args:
        model: A whole model of this package.
        place: Index of the stage, and their number.

    Raises:
        ConfigurationError: If the model is another library's, has tied embeddings, or fewer layers than stages.
    """
    if not isinstance(model, Transformer):
        raise ConfigurationError(
            f"PipelineModule can cut models of lightning_lm.models, and got {type(model).__name__}. Convert it with "
            "lightning_lm.models, or use another strategy."
        )
    if model.head.weight is model.embed.weight:
        raise ConfigurationError(
            "tie_embeddings=True: the first stage looks tokens up in the weight that the last one makes logits with, "
            "so two ranks would train copies of it. Set tie_embeddings=False, or use another strategy."
        )
    if len(model.layers) < place.num_stages:
        raise ConfigurationError(
            f"{len(model.layers)} layers cannot be divided among {place.num_stages} stages; use fewer devices."
        )
    first, stop = (stage * len(model.layers) // place.num_stages for stage in (place.stage, place.stage + 1))
    for index in range(len(model.layers)):
        if not first <= index < stop:
            model.layers[index] = _Elsewhere()
    if not place.first:
        # What has arrived is embedded already.
        model.embed, model.positions = _Arriving(), None  # type: ignore[assignment]
        model.config = dataclasses.replace(model.config, embed_scale=None, positions=None, dropout=0.0)
    if not place.last:
        model.norm, model.head = _Elsewhere(), _Elsewhere()  # type: ignore[assignment]
        model.config = dataclasses.replace(model.config, output_scale=None)


def _whole_micro_batches(batch: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Add rows without targets until the rows can be divided."""
    names = [name for name in ("input_ids", "labels", "position_ids", "document_ids") if batch.get(name) is not None]
    missing = -batch["labels"].size(0) % count
    fill = {"labels": IGNORE_INDEX}
    return {name: F.pad(batch[name], (0, 0, 0, missing), value=fill.get(name, 0)) for name in names}
