"""Base of the training modules: the model, the exact loss, optimizer and schedule, logging, checkpoints."""

import abc
import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lm._lightning import trainer_of
from lightning_lm.data.batches import batch_error
from lightning_lm.distributed import data_rank, require_all_ranks
from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.models import (
    ModelConfig,
    collect_auxiliary,
    describe_adapters,
    generation_settings,
    parameter_roles,
)
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.as_trained import read_as_trained, stop_where_trained
from lightning_lm.modules.checkpoint import ENTRY, VERSION, check_config, check_weights
from lightning_lm.modules.checkpoint_files import save_to_files
from lightning_lm.modules.divergence import DivergenceWatch, require_finite_weights
from lightning_lm.modules.expert_loads import LoadWindow, expert_layers
from lightning_lm.modules.gradient_normalization import GradientWindow, gradient_norm, held_gradients
from lightning_lm.modules.hyper_parameters import log_hyper_parameters
from lightning_lm.modules.model_owner import Compile, _ModelOwner
from lightning_lm.optim import AdamW, Cosine, NormHistory, OptimizerPart, Schedule, ScheduledLR, SkipRule
from lightning_lm.protocols import GradientHolder

__all__ = ["Compile", "LMModule", "seed_generator"]


class LMModule(_ModelOwner, abc.ABC):
    """Trains a language model with automatic optimization.

    The gradient of every optimizer step is exactly that of the sum over target tokens divided by their number over all
    ranks and micro-batches. Numbers reach the loggers every ``trainer.log_every_n_steps`` steps, as means over the
    tokens since the last time: ``train/loss``, ``train/lr``, ``train/grad_norm``, ``train/tokens``, and what a subclass
    gives to `record`. Between two logs the Trainer's own metrics have the mean ``train/loss`` so far, so that monitors
    and progress bars of Lightning see it from the first step. The loggers also get the module's parts as
    hyper-parameters. What is random in a step (dropout) depends only on seed, rank, step and micro-batch, so a resumed
    run repeats it.

    Args:
        model: Model to train: a config, built once the tokenizer is known, or a module.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.
        compile: Modules that `torch.compile` is applied to.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.
    """

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        optimizer: OptimizerPart = AdamW(),
        schedule: Schedule = Cosine(warmup=0.01),
        skip: SkipRule | None = None,
        compile: Compile = "none",
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(model, compile=compile, activation_checkpointing=activation_checkpointing)
        self.optimizer_part, self.schedule, self.skip = optimizer, schedule, skip
        self._reset_counters()

    def _reset_counters(self) -> None:
        self.skipped_steps = 0
        self.tokens_seen = torch.zeros((), dtype=torch.int64)
        """Target tokens of this run, over all ranks; on the module's device while it trains."""
        self._window = GradientWindow()
        self._loads = LoadWindow()
        self._interval: Tensor | None = None
        self._history = NormHistory()
        self._seed: int | None = None
        self._data_rank = 0
        self._has_experts = False
        self._grad_norm: Tensor | None = None
        self._watch = DivergenceWatch()
        self._trained.clear()

    def setup(self, stage: str) -> None:
        """Reset the counters, so that a new run starts its schedule at zero tokens; save without a copy in memory."""
        save_to_files(self.trainer)
        if stage == "fit":
            self._reset_counters()

    @abc.abstractmethod
    def training_loss(self, batch: Any) -> TokenLoss:
        """Return the sums of a micro-batch."""

    # --- optimization ---

    def configure_optimizers(self) -> Any:
        """Return one optimizer and one schedule, stepped after every optimizer step."""
        optimizer = self.build_optimizer()
        tokens = self.schedule.horizon_tokens
        position = None if tokens is None else lambda: int(self.tokens_seen)
        horizon = _steps_of(self.trainer, self.schedule) if tokens is None else tokens
        scheduler = ScheduledLR(optimizer, self.schedule, horizon=horizon, position=position)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def build_optimizer(self) -> Optimizer:
        """Return the optimizer of all that is trained."""
        return self.optimizer_part.build(self.model, parameter_roles(self.model))

    # --- one training step ---

    def on_fit_start(self) -> None:
        """Move the counters to the device, and agree on the seed of all that is random in a step.

        Raises:
            ConfigurationError: If the strategy keeps the gradients to itself.
        """
        if self.trainer.strategy.handles_gradient_accumulation:
            raise ConfigurationError(
                f"{type(self.trainer.strategy).__name__} accumulates gradients out of reach, so their mean over target "
                "tokens cannot be made exact. Use DDP, FSDP2 or one of lightning_lm.strategies."
            )
        stop_where_trained(self.model, self._tokenizer(), self._datamodule())
        read_as_trained(self.model, self._datamodule())
        self.tokens_seen = self.tokens_seen.to(self.device)
        self._interval = None if self._interval is None else self._interval.to(self.device)
        log_hyper_parameters(self.trainer, self)
        if self._seed is None:
            self._seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % 2**62))
        self._data_rank = data_rank(self.trainer)
        self._has_experts = bool(expert_layers(self))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum over the micro-batch's target tokens, scaled; see `GradientWindow`."""
        trainer = self.trainer
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        seed_generator(self.device, self._seed or 0, self._data_rank, trainer.global_step, micro_batch)
        try:
            with collect_auxiliary() as loads:
                loss, num_targets = self.training_loss(batch), self.target_tokens(batch)
        except (KeyError, TypeError, AttributeError) as error:
            raise batch_error(error, batch, self) from None
        if loads:
            loss = self._loads.add(loads, loss)
        positions = batch["labels" if "labels" in batch else "input_ids"].numel()
        return self._window.add(loss, positions=positions, trainer=trainer, num_targets=num_targets)

    def target_tokens(self, batch: Any) -> Tensor | None:
        """Return the number of target tokens of a micro-batch where the loss counts something else; else ``None``."""
        return None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradients exact, measure them, and drop them if the step is to be skipped."""
        trainer = self.trainer
        totals = self._window.close(held_gradients(optimizer, trainer.strategy), trainer)
        self.tokens_seen.add_(totals.num_targets.long())
        sums = torch.stack(totals)
        self._interval = sums if self._interval is None else self._interval + sums
        self._show_loss(self._interval[0] / self._interval[1])
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = every > 0 and (trainer.global_step + 1) % every == 0
        # A gradient scaler meets infinities as it searches its scale, and leaves those steps out.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        measures = logs or self.skip or trainer.gradient_clip_val or (scaled and self._has_experts)
        self._grad_norm = gradient_norm(optimizer, trainer.strategy) if measures else None
        skipped = self._skip_if_bad(optimizer)
        if self._has_experts:
            left_out = scaled and not bool(torch.isfinite(self._grad_norm))  # type: ignore[arg-type]
            self._loads.close(self, trainer, totals.num_tokens, skipped=skipped or left_out)
        if not skipped:
            self._watch.add(trainer.global_step + 1, totals.nll_sum, None if scaled else self._grad_norm)
        if logs:
            self._watch.require_finite(trainer)
            self._log_interval(optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that is already known, where Lightning would measure it again."""
        plain = type(self.trainer.precision_plugin).clip_grad_by_norm is Precision.clip_grad_by_norm
        plain = plain and not isinstance(self.trainer.strategy, GradientHolder)
        if not gradient_clip_val or self._grad_norm is None or gradient_clip_algorithm == "value" or not plain:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._grad_norm)

    def _skip_if_bad(self, optimizer: Optimizer) -> bool:
        if self.skip is None or self._grad_norm is None:
            return False
        reason = self.skip.reason(self._grad_norm.item(), self._history)
        if reason is None:
            return False
        self.skipped_steps += 1
        rank_zero_warn(f"Step {self.trainer.global_step + 1} is skipped: {reason}.")
        optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
        return True

    def on_train_end(self) -> None:
        """Stop if a step after the last log interval was not finite."""
        self._watch.require_finite(self.trainer)

    # --- logging ---

    def _log_interval(self, optimizer: Optimizer) -> None:
        assert self._grad_norm is not None
        assert self._interval is not None
        nll, tokens, _ = self._interval.tolist()
        self._interval = None
        metrics = {
            "train/loss": nll / tokens if tokens else math.nan,
            "train/lr": float(optimizer.param_groups[0]["lr"]),
            "train/grad_norm": self._grad_norm.item(),
            "train/tokens": float(self.tokens_seen),
        }
        if self.skip is not None:
            metrics["train/skipped_steps"] = float(self.skipped_steps)
        self._log_training(metrics)

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to build the model again and to go on exactly.

        Raises:
            DivergenceError: If a loss, gradient or weight is not finite; nothing is overwritten then.
        """
        require_all_ranks(self.trainer)
        self._watch.require_finite(self.trainer)
        require_finite_weights(self.trainer, self)
        tokenizer = self.trained_tokenizer()
        checkpoint[ENTRY] = {
            "version": VERSION,
            "module": type(self).__name__,
            "model": self._model_description(),
            "tokenizer": tokenizer.to_files() if hasattr(tokenizer, "to_files") else None,
            "generation": generation_settings(self.model),
            "adapters": describe_adapters(self.model),
            "tokens_seen": int(self.tokens_seen),
            "interval": None if self._interval is None else self._interval.tolist(),
            "recorded": self._trained.state_dict(self.trainer.strategy),
            "skipped_steps": self.skipped_steps,
            "norm_history": self._history.state_dict(),
            "counts_per_token": self._loads.state_dict(self),
            "seed": self._seed,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, and take the counters from it.

        Raises:
            CheckpointError: If another kind of module, or another model, wrote it.
        """
        entry = checkpoint.get(ENTRY)
        if entry is None:
            raise CheckpointError(
                "The checkpoint was not written by a module of lightning-lm. Load its 'state_dict' into the model and "
                "start a new run from there."
            )
        check_config(entry["model"], self._model_description())
        self.attach_saved_adapters(checkpoint)
        check_weights(checkpoint["state_dict"], self.state_dict(), source="The checkpoint")
        self.tokens_seen = torch.tensor(entry["tokens_seen"], device=self.device)
        sums = entry["interval"]
        self._interval = None if sums is None else torch.tensor(sums, dtype=torch.float64, device=self.device)
        if data_rank(trainer_of(self)) == 0:  # also without a Trainer: `load_from_checkpoint`
            self._trained.load_state_dict(entry["recorded"], device=self.device)
        self.skipped_steps, self._seed = entry["skipped_steps"], entry["seed"]
        self._history = NormHistory(**entry["norm_history"])
        self._loads.load_state_dict(entry.get("counts_per_token", {}), self, self.device)


def _steps_of(trainer: Trainer, schedule: Schedule) -> int:
    """Return the length of a run in optimizer steps.

    Raises:
        ConfigurationError: If it has none and the schedule needs one.
    """
    steps = trainer.estimated_stepping_batches
    if steps != float("inf"):
        return int(steps)
    if schedule.needs_horizon:
        raise ConfigurationError(
            f"{type(schedule).__name__} needs the length of the run, and the Trainer has none. "
            "Set max_steps or max_epochs, give the schedule horizon_tokens, or use Constant."
        )
    return 1


def seed_generator(device: torch.device, *parts: int) -> None:
    """Seed the global generator of one device, and of no other.

    Args:
        device: Device of the model.
        parts: Numbers that name the moment: seed, rank, step, ... Each of them decides the random numbers.
    """
    seed = 0
    for part in parts:  # a linear congruential generator (Knuth's MMIX) that takes in a number at each step
        seed = ((seed + part) * 6364136223846793005 + 1442695040888963407) % 2**63
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
