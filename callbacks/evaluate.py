"""Scores on evaluation tasks while a model trains."""

import functools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.text import Text

from lightning_lm.callbacks.hooks import Attempt, LeanHooks, clocks_stopped, emit, reason_of, without_side_effects
from lightning_lm.callbacks.prompts import find_tokenizer
from lightning_lm.distributed import Ranks, data_rank, data_ranks, runs_alone, whole_model
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals import ItemResult, LocalModel, Results, Task
from lightning_lm.evals.runner import answer_part, chosen_items, results_of
from lightning_lm.modules import PipelineModule
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.protocols import Tokenizer

__all__ = ["Evaluate"]


class Evaluate(LeanHooks, Callback):
    """Evaluate the live model on tasks every few steps, at the end of a fit, and in ``trainer.validate``.

    Logs ``eval/TASK/METRIC``, and prints the main metric of each task with its 95 % interval. Random state, modes and
    gradients are restored, so a run with evaluations and one without are bit-equal. Works under every strategy whose
    ranks can run the whole model. Ranks that read different data share the items among them, where they do not need
    each other for a pass; the scores are those of one process. An error is reported once and does not end the run.

    Args:
        tasks: Names of tasks, or tasks.
        every: Optimizer steps between evaluations; ``None`` for none before the end.
        data: Folder of the published files of tasks that are given by name.
        limit: Most items of a task, evenly spread over it.
        batch_size: Most rows of a forward pass.
        max_share: Largest fraction of the time of training that evaluations before its end may take; one that would
            take more is skipped, and a message says so. Unitless.
        chat: Write prompts by the tokenizer's chat template.
        tokenizer: Tokenizer of the model; by default ``trainer.datamodule.tokenizer``.

    Attributes:
        results: Results of the newest evaluation.

    Raises:
        ConfigurationError: If a number is out of range; at fit start, if a task is unknown or there is no tokenizer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import Evaluate
        >>> evaluate = Evaluate(["docs_choice"], every=500)
        >>> trainer = Trainer(callbacks=[evaluate], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        tasks: Sequence[str | Task],
        *,
        every: int | None = None,
        data: str | None = None,
        limit: int | None = None,
        batch_size: int = 32,
        max_share: float = 0.1,
        chat: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_numbers(
            {"every": Limit.COUNT, "limit": Limit.COUNT, "batch_size": Limit.COUNT, "max_share": Limit.INSIDE_ONE},
            {"every": every, "limit": limit, "batch_size": batch_size, "max_share": max_share},
        )
        self.results: Results | None = None
        self._given, self._data, self._tokenizer = list(tasks), data, tokenizer
        self._every, self._max_share = every, max_share
        self._limit, self._batch_size, self._chat = limit, batch_size, chat
        self._tasks: list[Task] = []
        self._last_step = self._evaluated_step = -1
        self._fails = self._skipped = False
        self._start_s, self._spent_s, self._cost_s = 0.0, 0.0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse unknown tasks and missing data early, rather than after the first steps."""
        if stage in ("fit", "validate"):
            find_tokenizer(trainer, self._tokenizer, "Evaluate")
            self._tasks = _tasks(self._given, self._data)
            self._last_step = -1
            self._fails = isinstance(pl_module, PipelineModule)
            if self._fails:
                rank_zero_warn(
                    "Evaluate does nothing in this run: each rank has one stage of the model, not all of it."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of training."""
        self._last_step, self._evaluated_step, self._skipped = trainer.global_step, -1, False
        self._start_s, self._spent_s, self._cost_s = time.monotonic(), 0.0, 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate if it is time, and if there is time."""
        step = trainer.global_step
        if self._every is None or step % self._every or step == self._last_step or self._fails:
            return
        # Together: the clocks of ranks differ.
        if trainer.strategy.reduce_boolean_decision(self._has_time(trainer, pl_module), all=True):
            self._evaluate(trainer, pl_module)
        else:
            self._last_step = step
            if not self._skipped:
                self._skipped = True
                rank_zero_warn(
                    f"Evaluate skips step {step}, and others where it must: an evaluation takes about "
                    f"{self._cost_s:.1f} s, which would be more than max_share={self._max_share:g} of the time of "
                    "training. Set a larger max_share, more steps between evaluations (every), or a limit of items."
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate in ``trainer.validate``."""
        if trainer.state.fn == "validate" and not self._fails:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the final weights."""
        if not self._fails and trainer.global_step != self._evaluated_step:
            self._evaluate(trainer, pl_module)

    def _has_time(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Return whether one more evaluation keeps to the share; the first one's time is estimated from a few items."""
        if not self._cost_s:
            self._cost_s = self._estimate_s(trainer, pl_module)
        spent = self._spent_s + self._cost_s
        return spent <= self._max_share * (time.monotonic() - self._start_s + self._cost_s)

    def _estimate_s(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Return the time that all items will take, from that of one of each task, which warms up, and of four more."""
        counts = [min(len(task.items()), self._limit or len(task.items())) for task in self._tasks]
        times = []
        for limit in (1, 5):
            start = time.monotonic()
            with Attempt():
                self._run(trainer, pl_module, limit)
            times.append(time.monotonic() - start)
        self._spent_s += sum(times)
        each = times[1] / sum(min(5, count) for count in counts)
        return each * sum(counts)  # per item of all ranks together

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = self._evaluated_step = trainer.global_step
        start = time.monotonic()
        answered: list[list[ItemResult]] = []
        with Attempt() as attempt:
            answered = self._run(trainer, pl_module, self._limit)
        # Together: the others wait for the scores of this rank.
        self._fails = trainer.strategy.reduce_boolean_decision(attempt.error is not None, all=False)
        if not self._fails:
            parts = Ranks(trainer).gather_objects(answered) if runs_alone(trainer) else [answered]
            with Attempt() as attempt:
                self.results = self._results(trainer, pl_module, parts, time.monotonic() - start)
            self._fails = attempt.error is not None
        self._cost_s = time.monotonic() - start
        self._spent_s += self._cost_s
        results = self.results
        if self._fails or results is None:
            rank_zero_warn(f"Evaluate does nothing more in this run: it failed ({reason_of(attempt.error)})")
            return
        emit(
            trainer,
            {f"eval/{task.name}/{name}": score.value for task in results.tasks for name, score in task.scores.items()},
        )
        if trainer.is_global_zero:
            _print(trainer.global_step, results)

    def _run(self, trainer: Trainer, pl_module: LightningModule, limit: int | None) -> list[list[ItemResult]]:
        """Return the scores of this rank's items, or of all items if the ranks need each other for a pass."""
        alone = runs_alone(trainer)
        part, parts = (data_rank(trainer), data_ranks(trainer)) if alone else (0, 1)
        precision = trainer.precision_plugin.val_step_context()
        with (
            clocks_stopped(trainer),
            without_side_effects(pl_module, pl_module.device),
            _random_state_kept(),
            whole_model(trainer),
            precision,
        ):
            model = self._model(trainer, pl_module)
            return answer_part(chosen_items(self._tasks, limit), model, part=part, parts=parts)

    def _model(self, trainer: Trainer, pl_module: LightningModule) -> LocalModel:
        together = trainer.world_size > 1 and (not runs_alone(trainer) or data_ranks(trainer) == 1)
        agree = functools.partial(trainer.strategy.reduce_boolean_decision, all=False)
        return LocalModel(
            getattr(pl_module, "model", pl_module),
            find_tokenizer(trainer, self._tokenizer, "Evaluate"),
            batch_size=self._batch_size,
            chat=self._chat,
            description={"step": str(trainer.global_step)},
            # Ranks that need each other for a pass make equally many, also if one of them would stop earlier.
            steps_agree=agree if together else None,
        )

    def _results(
        self, trainer: Trainer, pl_module: LightningModule, parts: list[list[list[ItemResult]]], duration_s: float
    ) -> Results:
        """Return the results of the items of all ranks, in the order of the items."""
        chosen = chosen_items(self._tasks, self._limit)
        answered = [[item for part in parts for item in part[place]] for place in range(len(chosen))]
        settings = {"seed": 0, "limit": self._limit}
        with _random_state_kept():
            model = self._model(trainer, pl_module)
            return results_of(chosen, answered, model, settings=settings, duration_s=duration_s)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the random state of Python and NumPy, which scores of tasks may use."""
    own, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(of_numpy)


def _tasks(given: Sequence[str | Task], data: str | None) -> list[Task]:
    found: list[Task] = []
    for entry in given:
        if isinstance(entry, Task):
            found.append(entry)
            continue
        from lightning_lm.evals.tasks import by_name

        found.append(by_name(entry, data=data))
    if not found:
        raise ConfigurationError("Evaluate has no tasks; give at least one, such as docs_choice.")
    for task in found:
        if not task.items():
            raise ConfigurationError(f"The task {task.name} has no items.")
    return found


def _print(step: int, results: Results) -> None:
    for task in results.tasks:
        score = task.main
        chance = f", chance {task.chance:.3f}" if task.chance else ""
        text = f"{task.name} {task.main_metric} {score.value:.4f} ({score.low:.4f} to {score.high:.4f}{chance})"
        rich.get_console().print(Text.assemble((f"eval at step {step:,}: ", "dim"), text))
