"""Table of a policy's completions with their rewards and advantages: the place to see reward hacking."""

from typing import Any, NamedTuple

import numpy as np
import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from rich.text import Text

from lightning_lm.callbacks.formatting import visible
from lightning_lm.callbacks.hooks import LeanHooks, LogInterval
from lightning_lm.deprecation import takes_renamed_arguments
from lightning_lm.errors import ConfigurationError
from lightning_lm.modules import PolicyModule, Rollout
from lightning_lm.modules.rl.experience_loader import Experience
from lightning_lm.types import IGNORE_INDEX

__all__ = ["Completions"]


class _Row(NamedTuple):
    prompt: str
    completion: str
    rewards: tuple[float, ...]
    total: float
    advantage: float


@takes_renamed_arguments
class Completions(LeanHooks, Callback):
    """Show prompts, completions, rewards and advantages of the newest rollout, in the console and in TensorBoard.

    The groups with the widest spread of rewards are shown: they carry the learning signal. Of each, the completions
    with the highest and lowest rewards.

    Args:
        every_n_steps: Optimizer steps between two tables; by default the Trainer's logging interval.
        prompts: Number of groups to show.
        completions: Number of completions of each group.

    Raises:
        ConfigurationError: If a number is below 1, or the module makes no rollouts.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import Completions
        >>> trainer = Trainer(callbacks=[Completions(every_n_steps=50)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, every_n_steps: int | None = None, prompts: int = 1, completions: int = 4) -> None:
        if min(every_n_steps or 1, prompts, completions) < 1:
            raise ConfigurationError(
                f"every_n_steps={every_n_steps}, prompts={prompts} and completions={completions} must be at least 1."
            )
        self._every_n_steps, self._prompts, self._completions = every_n_steps, prompts, completions
        self._interval = LogInterval()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that has no rollouts to show."""
        if not isinstance(pl_module, PolicyModule):
            raise ConfigurationError(
                f"Completions shows the rollouts of GRPOModule or PPOModule; {type(pl_module).__name__} makes none. "
                "SampleText shows completions of any model."
            )
        self._interval.reset(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show a table if it is time."""
        if not self._interval.stepped(trainer):
            return
        every = self._every_n_steps
        due = self._interval.ends(trainer) if every is None else trainer.global_step % every == 0
        taken: tuple[Rollout, Experience] | None = getattr(pl_module, "last_rollout", None)
        if due and trainer.is_global_zero and taken is not None:
            rollout, experience = taken
            rows = self._rows(rollout, experience)
            rich.get_console().print(_table(rows, rollout.names, trainer.global_step))
            _write(trainer, rows, rollout.names)

    def _rows(self, rollout: Rollout, experience: Experience) -> list[_Row]:
        advantages = _per_answer(experience)
        groups = np.nan_to_num(rollout.groups)
        widest = np.argsort(groups.min(1) - groups.max(1), kind="stable")[: self._prompts]
        return [
            self._row(rollout, advantages, int(group), int(sample))
            for group in widest
            for sample in _ends(np.argsort(-groups[group], kind="stable"), self._completions)
        ]

    def _row(self, rollout: Rollout, advantages: np.ndarray, group: int, sample: int) -> _Row:
        place = group * rollout.samples + sample
        rewards = tuple(rollout.values[place].tolist())
        text = rollout.completions[place].text
        return _Row(
            rollout.prompts["texts"][group], text, rewards, float(rollout.totals[place]), float(advantages[place])
        )


def _per_answer(experience: Experience) -> np.ndarray:
    """Return one advantage a completion: its own, or the mean over its tokens."""
    advantages = experience["advantages"]
    if advantages.dim() == 2:
        learned = experience["labels"][:, 1:] != IGNORE_INDEX
        advantages = (advantages * learned).sum(1) / learned.sum(1).clamp(min=1)
    values: np.ndarray = advantages.float().cpu().numpy()
    return values


def _ends(order: np.ndarray, count: int) -> np.ndarray:
    """Return the first and the last of an order, half of the count each."""
    if len(order) <= count:
        return order
    return np.concatenate([order[: -(-count // 2)], order[len(order) - count // 2 :]])


def _table(rows: list[_Row], names: tuple[str, ...], step: int) -> Table:
    table = Table(title=f"completions at step {step:,}", title_justify="left", title_style="dim")
    for name in ("prompt", "answer"):
        table.add_column(name, overflow="fold", ratio=1)
    for name in (*names, "advantage") if len(names) == 1 else (*names, "reward", "advantage"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(visible(row.prompt)), Text(visible(row.completion)), *_numbers(row))
    return table


def _numbers(row: _Row) -> list[str]:
    values = (*row.rewards, row.advantage) if len(row.rewards) == 1 else (*row.rewards, row.total, row.advantage)
    return ["-" if np.isnan(value) else f"{value:.3g}" for value in values]


def _write(trainer: Trainer, rows: list[_Row], names: tuple[str, ...]) -> None:
    columns = ("prompt", "answer", *names, *(() if len(names) == 1 else ("reward",)), "advantage")
    lines = [columns, ("---",) * len(columns)]
    lines += [(_cell(row.prompt), _cell(row.completion), *_numbers(row)) for row in rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for logger in trainer.loggers:
        add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
        if add_text is not None:
            add_text("completions", text, global_step=trainer.global_step)


def _cell(text: str) -> str:
    """Return a text that stays in its cell of a Markdown table, and is shown as it is."""
    escaped = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return escaped.replace("\n", "<br>")
