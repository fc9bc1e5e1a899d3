"""Runs of a ``sweep`` block, with their cost known before the first step."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_lm.cli.trainer import CommandLine, prepare
from lightning_lm.errors import ConfigurationError, UsageError
from lightning_lm.models import ModelConfig
from lightning_lm.scaling import (
    Budget,
    ClockMeter,
    FlopMeter,
    Grid,
    IsoFlopPlan,
    Meter,
    ModelCost,
    RandomSearch,
    RunRecord,
    Trial,
    check_convention,
    measure_cost,
)

__all__ = ["SweepPlan"]

_MARGIN = 1.05
_WITHOUT_COST = ("model.optimizer.", "model.schedule.", "seed_everything")


@dataclass(frozen=True, kw_only=True)
class _Sized:
    """A described model: its cost, and what a step of its training is."""

    cost: ModelCost
    tokens_per_step: int
    max_steps: int


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The ``sweep`` block of a YAML file.

    Args:
        models: Settings of ``fit``, dotted, one mapping for each size of an isoFLOP sweep; beside ``grid``, mappings
            that are each trained with all of its combinations.
        flops: Budgets of an isoFLOP sweep; each run is as long as its budget allows.
        held_out_flops: A larger budget that judges the fit; trained with fewer sizes.
        held_out_sizes: Number of model sizes to hold out.
        sizes_per_budget: Runs of each other budget.
        tokens_per_parameter: Expected optimum of tokens per parameter.
        grid: Values of settings, all combinations of which are trained as long as the config says.
        random: ``num_runs``, ``ranges``, ``choices`` and ``seed`` of independent draws.
        convention: In which FLOPs are counted.
        limit_flops: The most that may be spent; default: what the plan needs.
        limit_s: The most seconds; needs ``flops_per_s``.
        flops_per_s: FLOP/s that the device reaches in the slowest run.
    """

    models: Sequence[Mapping[str, Any]] = ()
    flops: Sequence[float] = ()
    held_out_flops: float | None = None
    held_out_sizes: int = 2
    sizes_per_budget: int = 5
    tokens_per_parameter: float = 20.0
    grid: Mapping[str, Sequence[Any]] | None = None
    random: Mapping[str, Any] | None = None
    convention: str = "products"
    limit_flops: float | None = None
    limit_s: float | None = None
    flops_per_s: float | None = None

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> Self:
        """Return the plan of a block.

        Args:
            block: Plain data.

        Raises:
            UsageError: If a key is unknown, or nothing says what to vary.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(block) - known)
        if unknown:
            raise UsageError(f"sweep: knows no {', '.join(unknown)}; its keys are {', '.join(sorted(known))}.")
        plan = cls(**{**block, "flops": [float(flops) for flops in block.get("flops", ())]})
        if not (plan.models and plan.flops) and not plan.grid and not plan.random:
            raise UsageError("sweep: needs models: and flops:, or grid:, or random:, to say what is varied.")
        check_convention(plan.convention)
        return plan

    def trials(self, configs: Sequence[str]) -> list[Trial]:
        """Return the runs, the cheapest budget first.

        Args:
            configs: Configurations for ``fit``.
        """
        if not self.flops:
            drawn = Grid(values=self.grid).settings() if self.grid else RandomSearch(**(self.random or {})).settings()
            settings = [{**model, **one} for model in self.models or ({},) for one in drawn]
            costs = _described_once(configs, settings)
            return [self._fixed(one, cost) for one, cost in zip(settings, costs, strict=True)]
        sized = [_described(configs, model) for model in self.models]
        sizes = [model.cost.size(self.convention) for model in sized]
        budgets = [(float(flops), self.sizes_per_budget) for flops in sorted(self.flops)]
        if self.held_out_flops is not None:
            budgets.append((float(self.held_out_flops), self.held_out_sizes))
        trials = []
        for flops, number in budgets:
            plan = IsoFlopPlan(flops=(flops,), sizes_per_budget=number, tokens_per_parameter=self.tokens_per_parameter)
            trials += [self._trial(self.models[i], sized[i], flops) for i in plan.choose(sizes, flops)]
        return trials

    def budget(self, planned: float, records: Sequence[RunRecord], trials: Sequence[Trial]) -> Budget:
        """Return what may be spent; runs of this sweep that are in the ledger count.

        Args:
            planned: FLOPs of all runs together.
            records: Records of the ledger.
            trials: Trials of this sweep.
        """
        meter: Meter = FlopMeter(convention=self.convention)
        limit = self.limit_flops or planned * _MARGIN
        if self.limit_s is not None:
            if self.flops_per_s is None:
                raise UsageError("sweep: limit_s needs flops_per_s, what the device reaches in its slowest run.")
            meter, limit = ClockMeter(flops_per_s=float(self.flops_per_s)), self.limit_s
        ids = {trial.id for trial in trials}
        mine = [r for r in records if r.finished and Trial(settings=r.hyper_parameters, flops=0.0).id in ids]
        return Budget(float(limit), meter, spent_by=mine)

    def _trial(self, model: Mapping[str, Any], sized: _Sized, flops: float) -> Trial:
        per_step = sized.cost.flops_per_token[self.convention] * sized.tokens_per_step
        steps = max(1, round(flops / per_step))
        settings = {**model, "trainer.max_steps": steps, "trainer.val_check_interval": steps}
        size, tokens = sized.cost.size(self.convention), steps * sized.tokens_per_step
        name = f"{flops:.3g} FLOPs, {size:.3g} parameters, {tokens:.3g} tokens"
        return Trial(settings=settings, flops=steps * per_step, name=name)

    def _fixed(self, settings: Mapping[str, Any], sized: _Sized) -> Trial:
        if sized.max_steps < 1:
            raise UsageError("A sweep over grid: or random: needs trainer.max_steps, the length of its runs.")
        flops = sized.cost.flops_per_token[self.convention] * sized.tokens_per_step * sized.max_steps
        name = ", ".join(f"{key.rpartition('.')[2]}={_brief(value)}" for key, value in settings.items())
        return Trial(settings={**settings, "trainer.val_check_interval": sized.max_steps}, flops=flops, name=name)


class _Description(CommandLine):
    """Builds module and data as ``fit`` would, and trains nothing."""

    def fit(self, **arguments: Any) -> None:
        """Leave the parts where `_described` finds them."""


def _described_once(configs: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> Iterator[_Sized]:
    """Describe each model; settings of optimizer and schedule do not change what it costs, so it is built once."""
    known: dict[str, _Sized] = {}
    for one in settings:
        sizing = {key: value for key, value in one.items() if not key.startswith(_WITHOUT_COST)}
        if repr(sizing) not in known:
            known[repr(sizing)] = _described(configs, one)
        yield known[repr(sizing)]


def _described(configs: Sequence[str], settings: Mapping[str, Any]) -> _Sized:
    words = [f"--config={config}" for config in configs]
    prepare()
    with contextlib.redirect_stdout(io.StringIO()):
        built = _Description("fit", [*words, *(f"--{key}={value}" for key, value in settings.items())])
    context_length = getattr(built.datamodule, "context_length", None)
    batch_size = getattr(built.datamodule, "batch_size", None)
    if not context_length or not batch_size:
        raise ConfigurationError(
            f"{type(built.datamodule).__name__} has no context_length and batch_size, so tokens per step are unknown."
        )
    cost = _cost(built.model, built.datamodule, context_length)
    return _Sized(cost=cost, tokens_per_step=context_length * batch_size, max_steps=built.trainer.max_steps)


def _cost(module: LightningModule, datamodule: LightningDataModule, context_length: int) -> ModelCost:
    config = getattr(module, "model_config", None)
    if isinstance(config, ModelConfig):
        datamodule.prepare_data()
        tokenizer = getattr(datamodule, "tokenizer", None)
        with torch.device("meta"):
            return measure_cost(config.build(None if tokenizer is None else tokenizer.vocab_size), context_length)
    return measure_cost(getattr(module, "model", module), context_length)


def _brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
