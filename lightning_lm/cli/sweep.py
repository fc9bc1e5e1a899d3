"""The verb ``lightning-lm sweep``: many runs of ``fit`` under one budget, as the ``sweep`` block of a recipe says."""

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_lm.cli.config.overlays import read_overlays
from lightning_lm.cli.numbers import COUNT
from lightning_lm.errors import LightningLMError, UsageError
from lightning_lm.storage import held, replacing

if TYPE_CHECKING:
    from lightning_lm.scaling import Outcome, Trial

__all__ = ["add_arguments", "quiet", "run"]

_FAILURES = ("refused", "failed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``lightning-lm sweep`` takes.

    Args:
        parser: The parser of the verb.
    """
    parser.add_argument(
        "--config", action="append", required=True, metavar="NAME", help="recipe or YAML file with a sweep: block"
    )
    parser.add_argument("--ledger", type=Path, required=True, metavar="PATH", help="where finished runs are recorded")
    parser.add_argument(
        "--jobs", type=COUNT, metavar="N", help="a process for each run, N at a time (default: this one)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")


def run(arguments: argparse.Namespace) -> int:
    """Train what the ledger does not hold yet.

    Args:
        arguments: Parsed arguments of `add_arguments`.

    Returns:
        0 when every run is in the ledger, 1 otherwise.

    Raises:
        UsageError: If no config has a sweep block, or the block cannot be understood.
    """
    from lightning_lm.cli.sweep_plan import SweepPlan
    from lightning_lm.scaling import RunLedger, Sweep

    plan = SweepPlan.from_dict(_block(arguments.config))
    ledger = RunLedger(arguments.ledger)
    for bad in ledger.bad_lines():
        print(f"{ledger.path}, line {bad.number} is passed over: {bad.reason}.", file=sys.stderr)
    trials = plan.trials(arguments.config)
    total = sum(trial.flops for trial in trials)
    print(f"{len(trials)} runs, {total:.3g} FLOPs in all ({plan.convention}).")
    if arguments.dry_run:
        for trial in trials:
            print(f"  {trial}")
        return 0
    train = _own_process if arguments.jobs else _in_process
    budget = plan.budget(total, ledger.read(), trials)
    sweep = Sweep(
        trials, lambda trial: train(_overlay(trial, arguments)), ledger=ledger, budget=budget, jobs=arguments.jobs or 1
    )
    with held(_runs_of(ledger.path), "use another --ledger"), quiet():
        missing = _report(sweep.run(), trials, lambda: f"{budget.spent:.3g} of {budget.limit:.3g} {budget.meter.unit}")
    verb = "compare" if plan.grid else "fit"
    if plan.models and any(name.endswith("lr") for name in plan.grid or ()):
        verb = "transfer"
    print(f"\nWhat to type next:\n  lightning-lm scaling {verb} {ledger.path} --plot {ledger.path.parent / 'report'}")
    return 1 if missing else 0


def _block(configs: Sequence[str]) -> Mapping[str, Any]:
    merged: dict[str, Any] = {}
    for name in configs:
        for overlay in read_overlays(name):
            if overlay.sweep is not None and not isinstance(overlay.sweep, dict):
                raise UsageError(f"{overlay.path}: sweep: must hold keys such as flops: and models:.")
            merged |= overlay.sweep or {}
    if not merged:
        raise UsageError(
            f"{', '.join(configs)} has no sweep: block. Start from a recipe that has one, for example "
            "scaling/isoflop_quickstart (`lightning-lm recipes show scaling/isoflop_quickstart`)."
        )
    return merged


def _runs_of(ledger: Path) -> Path:
    return ledger.parent / f"{ledger.stem}_runs"


def _overlay(trial: "Trial", arguments: argparse.Namespace) -> Path:
    """Write the config of a run beside the ledger: ``fit --config`` of this file repeats it."""
    folder = _runs_of(arguments.ledger)
    folder.mkdir(parents=True, exist_ok=True)
    callback = {
        "class_path": "ScalingLaw",
        "init_args": {
            "ledger": str(arguments.ledger.absolute()),
            "hyper_parameters": dict(trial.settings),
            "name": trial.name,
        },
    }
    content: dict[str, Any] = {"base": [_absolute(name) for name in arguments.config]}
    for key, value in trial.settings.items():
        inner = content
        *outer, last = key.split(".")
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    content.setdefault("trainer", {})["callbacks+"] = [callback]
    if _logger_of(arguments.config) in ("CSVLogger", "TensorBoardLogger"):
        # Two runs that begin at once would choose the same number, and write into one file.
        content["trainer"]["logger"] = {"init_args": {"version": trial.id}}
    path: Path = folder / f"{trial.id}.yaml"
    with replacing(path) as file:
        file.write(yaml.safe_dump(content, sort_keys=False).encode())
    return path


def _logger_of(configs: Sequence[str]) -> str | None:
    """Return the name of the class that logs, if it is one."""
    name = None
    for overlay in (overlay for config in configs for overlay in read_overlays(config)):
        trainer = yaml.safe_load(overlay.to_yaml()).get("trainer") or {}
        if "logger" in trainer:
            logger = trainer["logger"]
            name = logger.get("class_path", name) if isinstance(logger, dict) else None
    return name and str(name).rpartition(".")[2]


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).is_file() else name


def _in_process(path: Path) -> None:
    from lightning_lm.cli import trainer

    trainer.run("fit", ["--config", str(path)])


def _own_process(path: Path) -> None:
    log = path.with_suffix(".log")
    with log.open("w") as output:
        command = [sys.executable, "-m", "lightning_lm", "fit", "--config", str(path)]
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        raise LightningLMError(f"it ended with status {status}: {last} (all of it: {log})")


def _report(outcomes: Iterator["Outcome"], trials: Sequence["Trial"], spent: Callable[[], str]) -> int:
    begin, missing, made = time.perf_counter(), 0, 0.0
    left = sum(trial.flops for trial in trials)
    for index, outcome in enumerate(outcomes, start=1):
        elapsed_s, record = time.perf_counter() - begin, outcome.record
        left -= outcome.trial.flops
        made += outcome.trial.flops if outcome.status == "trained" else 0.0
        what = f"loss {record.loss:.4f}" if record else f"{outcome.status}: {outcome.message}"
        note = " (in the ledger already)" if outcome.status == "found" else f"  spent {spent()}"
        note += f"  {_clock(elapsed_s * left / made)} left" if made and left > 0 else ""
        print(f"[{index:>3}/{len(trials)}] {_clock(elapsed_s)}  {outcome.trial}  {what}{note}", flush=True)
        missing += outcome.status in _FAILURES
    print(f"{_clock(time.perf_counter() - begin)} of wall time, {_cpu_s():.0f} CPU-seconds.")
    return missing


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _cpu_s() -> float:
    """Return the CPU time of this process and of those it has waited for, the start included."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Reduce the output of Lightning to warnings, for verbs that print a line for each run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
