"""Every run leaves its point in a ledger, and as soon as there are enough, the law they follow."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lm.callbacks.batches import context_of, num_predictions
from lightning_lm.callbacks.evaluate import Evaluate
from lightning_lm.callbacks.flops import training_flops_per_token
from lightning_lm.callbacks.hooks import LeanHooks, LogInterval, emit
from lightning_lm.callbacks.training_loss import TrainingLoss
from lightning_lm.distributed import data_ranks
from lightning_lm.errors import DataError, MissingDependencyError
from lightning_lm.parts import Limit, Part, check_numbers
from lightning_lm.protocols import LanguageModel
from lightning_lm.scaling import (
    Estimator,
    ModelCost,
    Points,
    RunLedger,
    RunRecord,
    ScalingFit,
    fit_parametric,
    measure_cost,
    points_of,
)

__all__ = ["ScalingLaw"]

_VALIDATION = ("val/loss", "val_loss")
_ENOUGH_RUNS = 8
_PACKAGES = ("lightning-lm", "lightning", "torch")


class ScalingLaw(LeanHooks, Callback):
    """Record the run in a ledger when it ends, and fit the ledger.

    A record has the size in every convention, tokens, loss, curve, seconds, hyper-parameters and versions, and what
    `Evaluate` scored with the same weights. The loss
    is that of the last validation if it came after the last step, else the mean training loss of the last logging
    interval, from the losses that ``training_step`` returned. Works with any LightningModule whose batches have tokens
    (``input_ids``, or a pair of inputs and targets); in ``validation_step`` or `Perplexity` it should log ``val/loss``.

    With eight runs of several sizes the parametric law is fitted: ``scaling/alpha``, ``scaling/beta``, ``scaling/E``
    and the exponent of the optimal size go to the loggers, figures to TensorBoard where matplotlib is there.

    Args:
        ledger: Path of the ledger; created when the first run ends.
        at_tokens: Also record the first validation at or after each of these. Only meaningful if the learning rate
            is constant so far (the stable part of WSD).
        hyper_parameters: Plain data that distinguishes this run from others. By default ``hparams`` of the module,
            model config, learning rate, tokens per step, steps and seed.
        name: Name of the run in figures.
        unique_tokens: Number of unique tokens of the training set; needed for laws of repeated data.
        convention: Convention of parameter counts in the fit and the figures.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import ScalingLaw
        >>> trainer = Trainer(callbacks=[ScalingLaw("ledger.jsonl")], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        ledger: Path | str,
        *,
        at_tokens: Sequence[int] = (),
        hyper_parameters: Mapping[str, Any] | None = None,
        name: str = "",
        unique_tokens: int | None = None,
        convention: str = "products",
    ) -> None:
        check_numbers({"unique_tokens": Limit.COUNT}, {"unique_tokens": unique_tokens})
        self._ledger = RunLedger(ledger)
        check_numbers({"at_tokens": Limit.COUNT}, {"at_tokens": at_tokens})
        self._at_tokens = sorted(at_tokens)
        self._settings, self._name, self._convention = hyper_parameters, name, convention
        self._unique_tokens = unique_tokens
        self._interval = LogInterval()
        self._reset()

    def _reset(self) -> None:
        self._tokens, self._seconds, self._left = 0, 0.0, self._at_tokens
        self._curve: list[tuple[float, float]] = []
        self._cost: ModelCost | None = None
        self._context_length = 0
        self._loss, self._noted_step, self._validated_step = TrainingLoss(), -1, -1
        self._resumed_s: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know of its beginning."""
        return {"tokens": self._tokens, "seconds": self._elapsed_s(), "curve": self._curve, "left": self._left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was written."""
        self._tokens, self._seconds = state_dict["tokens"], state_dict["seconds"]
        self._curve, self._left = [tuple(point) for point in state_dict["curve"]], state_dict["left"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, unless this fit continues it."""
        if stage == "fit" and not trainer.global_step:
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._interval.reset(trainer)
        self._loss.clear()
        self._resumed_s = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the model at the first batch, which says how long its rows are."""
        if self._cost is None and num_predictions(batch):
            self._context_length = context_of(batch)
            self._cost = _cost(pl_module, self._context_length)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens; note the loss where an interval ends."""
        self._tokens += num_predictions(batch) * data_ranks(trainer)
        self._loss.add(trainer, pl_module, outputs)
        if self._interval.stepped(trainer) and self._interval.ends(trainer):
            self._note(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._resumed_s = self._elapsed_s(), None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again; record a point that was asked for."""
        self._resumed_s = time.perf_counter()
        if trainer.sanity_checking:
            return
        self._validated_step = trainer.global_step
        if self._left and self._tokens >= self._left[0]:
            self._left = [tokens for tokens in self._left if tokens > self._tokens]
            self._record(trainer, pl_module, finished=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._resumed_s = self._elapsed_s(), None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the run, fit the ledger, on rank 0."""
        if trainer.fast_dev_run or trainer.interrupted or not self._tokens:  # type: ignore[attr-defined]
            return
        self._record(trainer, pl_module, finished=True)
        if trainer.is_global_zero:
            self._fit(trainer)

    def _elapsed_s(self) -> float:
        return self._seconds + (0.0 if self._resumed_s is None else time.perf_counter() - self._resumed_s)

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._noted_step = trainer.global_step
        loss = self._loss.read(trainer, pl_module)
        if loss is not None and 0 < loss < float("inf"):
            self._curve.append((float(self._tokens), loss))

    def _record(self, trainer: Trainer, pl_module: LightningModule, *, finished: bool) -> None:
        name = next((name for name in _VALIDATION if name in trainer.callback_metrics), None)
        if name is None or self._validated_step != trainer.global_step:
            if self._noted_step != trainer.global_step:
                self._note(trainer, pl_module)
            name = None
        loss = float(trainer.callback_metrics[name]) if name else self._curve[-1][1] if self._curve else float("nan")
        if not trainer.is_global_zero:
            return
        if self._cost is None or not 0 < loss < float("inf"):
            rank_zero_warn(f"Not recorded in {self._ledger.path}: a loss of {loss} after {self._tokens} tokens.")
            return
        run = RunRecord(
            parameters=self._cost.parameters,
            flops_per_token=self._cost.flops_per_token,
            tokens=self._tokens,
            loss=loss,
            loss_name=name or "train/loss",
            unique_tokens=self._unique_tokens,
            context_length=self._context_length,
            curve=tuple(self._curve),
            wall_time_s=self._elapsed_s(),
            hyper_parameters=_found_settings(trainer, pl_module) if self._settings is None else dict(self._settings),
            versions=_versions(),
            name=self._name,
            finished=finished,
            tasks=_task_scores(trainer),
        )
        if run in self._ledger:
            rank_zero_warn(f"This run is in {self._ledger.path} already (same settings, size and tokens): not added.")
        else:
            self._ledger.add(run)

    def _fit(self, trainer: Trainer) -> None:
        runs = [run for run in self._ledger.read() if run.finished and self._convention in run.flops_per_token]
        if len(runs) < _ENOUGH_RUNS:
            return
        points = points_of(runs, self._convention)
        try:
            fit = fit_parametric(points, Estimator(num_bootstraps=200))
        except DataError:  # all of one size so far
            return
        values = {f"scaling/{name}": fit.values[name] for name in ("E", "alpha", "beta")}
        emit(trainer, {**values, "scaling/size_exponent": fit.exponents[0].value})
        _draw(trainer, points, fit)


def _cost(pl_module: LightningModule, context_length: int) -> ModelCost:
    model = getattr(pl_module, "model", None)
    own = isinstance(model, LanguageModel)
    cost = measure_cost(model if own else pl_module, context_length)  # type: ignore[arg-type]
    products = training_flops_per_token(pl_module, context_length) or cost.flops_per_token["products"]
    return ModelCost(parameters=cost.parameters, flops_per_token={**cost.flops_per_token, "products": products})


def _found_settings(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    optimizer = next(iter(trainer.optimizers), None)
    config = getattr(getattr(pl_module, "model", None), "config", None)
    return {
        **{key: value for key, value in pl_module.hparams.items() if isinstance(value, int | float | str | bool)},
        "model": config.to_dict() if isinstance(config, Part) else type(pl_module).__name__,
        "lr": None if optimizer is None else max(_peak(group) for group in optimizer.param_groups),
        "max_steps": trainer.max_steps,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        "seed": os.environ.get("PL_GLOBAL_SEED"),
    }


def _task_scores(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return the scores that `Evaluate` found for these weights."""
    return {
        task.name: task.summary
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, Evaluate) and callback.results is not None
        for task in callback.results.tasks
        if callback.results.model.get("step") == str(trainer.global_step)
    }


def _peak(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _draw(trainer: Trainer, points: Points, fit: ScalingFit) -> None:
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not boards:
        return
    from lightning_lm.scaling.plots.fits import figures

    try:
        drawn = figures(points, fit)
    except MissingDependencyError:
        return
    for name, figure in drawn.items():
        for board in boards:
            board.experiment.add_figure(f"scaling/{name}", figure, trainer.global_step)
