"""What every training module shares: the model, the exact loss, optimizer and schedule, logging, checkpoints."""

import abc
import math
from typing import Any, Literal, Self

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.models import ModelConfig, as_language_model, parameter_roles
from lightning_lm.modules.checkpoint import ENTRY, VERSION, check_config, check_weights, with_vocabulary
from lightning_lm.modules.metrics import MeasuredModule
from lightning_lm.modules.ranks import data_rank, require_all_ranks
from lightning_lm.modules.recompute import ActivationCheckpointing, compile_blocks, recompute_blocks
from lightning_lm.modules.seeds import seed_generator
from lightning_lm.modules.window import GradientWindow, gradient_norm, held_gradients
from lightning_lm.optim import AdamW, Cosine, NormHistory, OptimizerPart, Schedule, ScheduledLR, SkipRule
from lightning_lm.parts import Part
from lightning_lm.protocols import GradientHolder

__all__ = ["Compile", "LMModule"]

Compile = Literal["none", "blocks"]
"""What `torch.compile` is applied to, in place: nothing, or each layer of the model."""


class LMModule(MeasuredModule, abc.ABC):
    """Trains a language model with automatic optimization.

    The gradient of every optimizer step is exactly that of the sum over target tokens divided by their number over all
    ranks and micro-batches. Numbers reach the loggers every ``trainer.log_every_n_steps`` steps, as means over the
    tokens since the last time: ``train/loss``, ``train/lr``, ``train/grad_norm``, ``train/tokens``, and what a subclass
    gives to `record`. What is random in a step (dropout) depends only on seed, rank, step and micro-batch, so a resumed
    run repeats it.

    Args:
        model: What to train: a config, built once the tokenizer is known, or a module.
        optimizer: Chooses by the parameters' roles.
        schedule: Factor on the learning rates.
        skip: When to leave out a step; costs one synchronisation with the device at every step.
        compile: What `torch.compile` is applied to.
        activation_checkpointing: What the backward pass computes again to save memory.
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
        super().__init__()
        self.model_config = model if isinstance(model, ModelConfig) else None
        if isinstance(model, nn.Module):
            self.model = as_language_model(model)
        self.optimizer_part, self.schedule, self.skip = optimizer, schedule, skip
        self.compile_what, self.activation_checkpointing = compile, activation_checkpointing
        self.skipped_steps = 0
        self.tokens_seen = torch.zeros((), dtype=torch.int64)
        """Target tokens that the model was trained on, over all ranks; on the module's device while it trains."""
        self._configured = False
        self._window = GradientWindow()
        self._interval: Tensor | None = None
        self._history = NormHistory()
        self._seed: int | None = None
        self._grad_norm: Tensor | None = None

    @abc.abstractmethod
    def training_loss(self, batch: Any) -> TokenLoss:
        """Return the sums of a micro-batch."""

    # --- model ---

    def configure_model(self) -> None:
        """Build the model and prepare its layers, once."""
        if self._configured:
            return
        if self.model_config is not None:
            self.model = self.model_config.build(self._vocab_size())
        _check_length(self.model, self._trainer)
        self._configured = True
        recompute_blocks(self.model, self.activation_checkpointing)
        if self.compile_what == "blocks":
            compile_blocks(self.model)

    def _vocab_size(self) -> int | None:
        tokenizer = self._tokenizer()
        return None if tokenizer is None else int(tokenizer.vocab_size)

    def _tokenizer(self) -> Any:
        try:
            trainer = self.trainer
        except RuntimeError:  # Lightning's word for a module without a Trainer
            return None
        return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)

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
        """Move the counters to the device and agree on the seed.

        Raises:
            ConfigurationError: If the strategy keeps the gradients to itself.
        """
        if self.trainer.strategy.handles_gradient_accumulation:
            raise ConfigurationError(
                f"{type(self.trainer.strategy).__name__} accumulates gradients out of reach, so their mean over target "
                "tokens cannot be made exact. Use DDP, FSDP2 or one of lightning_lm.strategies."
            )
        self._window.clear()
        self.tokens_seen = self.tokens_seen.to(self.device)
        self._interval = None if self._interval is None else self._interval.to(self.device)
        if self._seed is None:
            self._seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % 2**62))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum over the micro-batch's target tokens, scaled; see `GradientWindow`."""
        trainer = self.trainer
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        seed_generator(self.device, self._seed or 0, data_rank(trainer), trainer.global_step, micro_batch)
        return self._window.add(
            self.training_loss(batch),
            positions=batch["labels"].numel(),
            trainer=trainer,
            num_targets=self.target_tokens(batch),
        )

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
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = every > 0 and (trainer.global_step + 1) % every == 0
        measures = logs or self.skip or trainer.gradient_clip_val
        self._grad_norm = gradient_norm(optimizer, trainer.strategy) if measures else None
        if self.skip is not None and self._grad_norm is not None:
            self._skip_if_bad(self.skip, self._grad_norm.item(), optimizer)
        if logs:
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

    def _skip_if_bad(self, rule: SkipRule, norm: float, optimizer: Optimizer) -> None:
        reason = rule.reason(norm, self._history)
        if reason is None:
            return
        self.skipped_steps += 1
        rank_zero_warn(f"Step {self.trainer.global_step + 1} is skipped: {reason}.")
        optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient

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

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Return the module of a checkpoint, as Lightning does; a vocabulary that its config leaves out is found there.

        Args:
            checkpoint_path: A ``.ckpt`` file.
            args: As Lightning has them.
            kwargs: As Lightning has them, ``weights_only=True`` and the arguments of the module, such as ``model``.
        """
        if isinstance(kwargs.get("model"), ModelConfig):
            kwargs["model"] = with_vocabulary(kwargs["model"], checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to build the model again and to go on exactly."""
        require_all_ranks(self.trainer)
        tokenizer = self._tokenizer()
        checkpoint[ENTRY] = {
            "version": VERSION,
            "module": type(self).__name__,
            "model": self._model_description(),
            "tokenizer": tokenizer.to_files() if hasattr(tokenizer, "to_files") else None,
            "tokens_seen": int(self.tokens_seen),
            "interval": None if self._interval is None else self._interval.tolist(),
            "recorded": self._trained.state_dict(self.trainer.strategy),
            "skipped_steps": self.skipped_steps,
            "norm_history": self._history.state_dict(),
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
        check_weights(checkpoint["state_dict"], self.state_dict(), source="The checkpoint")
        self.tokens_seen = torch.tensor(entry["tokens_seen"])
        sums = entry["interval"]
        self._interval = None if sums is None else torch.tensor(sums, dtype=torch.float64)
        if data_rank(self._trainer) == 0:  # also where there is no Trainer: `load_from_checkpoint`
            self._trained.load_state_dict(entry["recorded"], device=self.device)
        self.skipped_steps, self._seed = entry["skipped_steps"], entry["seed"]
        self._history = NormHistory(**entry["norm_history"])

    def _model_description(self) -> dict[str, Any] | None:
        model = getattr(self, "model", None)
        config = getattr(model, "description", getattr(model, "config", None))
        return config.to_dict() if isinstance(config, Part) else None


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


def _check_length(model: nn.Module, trainer: Any) -> None:
    rows = getattr(getattr(trainer, "datamodule", None), "context_length", None)
    limit = getattr(getattr(model, "config", None), "context_length", None)
    if isinstance(rows, int) and isinstance(limit, int) and rows > limit:
        raise ConfigurationError(
            f"The data has context_length={rows}, but the model was described with context_length={limit}. Set both: "
            f"--model.model.context_length {rows}, or --data.context_length {limit}."
        )
