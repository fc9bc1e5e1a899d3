"""Stages in order: each is skipped, resumed or started, measured, and written into the report."""

import contextlib
import hashlib
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from lightning_lm.cli.road.plan import Road, Stage
from lightning_lm.cli.road.process import Tick, Usage, last_line, run_process, run_verb
from lightning_lm.cli.road.progress import Progress
from lightning_lm.cli.road.record import Attempt, RoadRecord, StageRecord
from lightning_lm.errors import LightningLMError, RunStopped, UsageError
from lightning_lm.storage import in_turn, replacing, run_record

__all__ = ["UNTRAINED", "Drive", "OwnProcesses", "Runner"]

UNTRAINED = "untrained"
"""Name of the measurement before the first stage of training."""
_SAVE_EVERY_S = 5.0


class Runner(Protocol):
    """Runs a verb, and measures a checkpoint."""

    def verb(self, words: list[str], log: Path, tick: Tick) -> Usage:
        """Run the words after ``lightning-lm``."""
        ...

    def measure(self, job: Path, log: Path, tick: Tick) -> Usage:
        """Carry out a job of `measure`."""
        ...


class OwnProcesses:
    """Runs everything in processes of their own: their memory and CPU-seconds are known, and they can be killed."""

    def verb(self, words: list[str], log: Path, tick: Tick) -> Usage:
        """Run the words after ``lightning-lm``."""
        return run_verb(words, log, tick)

    def measure(self, job: Path, log: Path, tick: Tick) -> Usage:
        """Carry out a job of `measure`."""
        return run_process([sys.executable, "-m", "lightning_lm.cli.road.measure", str(job)], log, tick)


class Drive:
    """One run of a road in its folder.

    Args:
        road: Stages.
        output: Folder; nobody else works in it.
        chosen: Names of the stages to run; the others have finished if they are needed.
        command: Command line that continues this run.
        runner: Runs the stages.
    """

    def __init__(self, road: Road, output: Path, chosen: set[str], *, command: str, runner: Runner) -> None:
        self.road, self.output, self.command = road, output, command
        self.record = RoadRecord(output)
        self._chosen, self._runner = chosen, runner
        self._digests = dict(_chained(road))
        self._progress = Progress(road, chosen)

    def run(self, report: Callable[[], None]) -> None:
        """Run what is missing.

        Args:
            report: Writes the report of what there is; called after each stage.

        Raises:
            UsageError: If a stage starts from one that has not finished and is not to be run.
            LightningLMError: If a stage fails.
        """
        self._check_starts()
        for index, stage in enumerate(self.road.stages):
            if stage.name not in self._chosen:
                continue
            self._progress.start(index, stage.expected_s)
            if self.finished(stage):
                self._progress.skipped(self.record.stages[stage.name].wall_s)
            else:
                if stage.config is not None and stage.start is None:
                    self._measure(stage, UNTRAINED, None)
                self._run(stage)
                self._progress.finished(last_line(self.log(stage)))
            if stage.config is not None:
                self._measure(stage, stage.name, self.checkpoint(stage))
            report()

    def finished(self, stage: Stage) -> bool:
        """Return whether a stage has finished with the command and the earlier stages that the road has now.

        Args:
            stage: A stage of the road.
        """
        entry = self.record.stages.get(stage.name)
        if entry is None or entry.digest != self._digests[stage.name]:
            return False
        if stage.config is not None and not entry.finished:
            self._adopt(stage, entry)
        return entry.finished and not self._is_lost(entry)

    def checkpoint(self, stage: Stage) -> str | None:
        """Return the last checkpoint of a stage of training that has finished.

        Args:
            stage: A stage of the road.
        """
        found = self.record.stages[stage.name].checkpoint
        return None if found is None else str(self.output / found)

    def log(self, stage: Stage) -> Path:
        """Return the file with the output of a stage.

        Args:
            stage: A stage of the road.
        """
        return self.output / "logs" / f"{self.road.stages.index(stage) + 1:02}-{stage.name}.log"

    def result(self, name: str) -> Path:
        """Return the file with the scores and samples of a stage.

        Args:
            name: Name of the stage, or `UNTRAINED`.
        """
        return self.output / "scores" / f"{name}.json"

    def _check_starts(self) -> None:
        for stage in self.road.stages:
            if stage.name not in self._chosen or stage.start is None or stage.start in self._chosen:
                continue
            if not self.finished(self.road.stage(stage.start)):
                raise UsageError(
                    f"The stage {stage.name!r} starts from {stage.start!r}, which has not finished in {self.output} "
                    "with these settings. Run it first: leave out --only, or name an earlier --from."
                )

    def _run(self, stage: Stage) -> None:
        entry = self._entry(stage)
        own = self._own_runs(stage, entry)
        for run in own:
            with in_turn(run):  # a process whose road was killed saves its last step
                pass
        if own and stage.config is not None and self._adopt(stage, entry):
            return
        words = stage.command(self.output, resume=any(run.glob("checkpoints/last*.ckpt") for run in own))
        entry.command = ["lightning-lm", *words]
        self._progress.say(shlex.join(entry.command))
        with self._attempt(entry.attempts, self.log(stage)) as (attempt, tick):
            usage = self._runner.verb(words, self.log(stage), tick)
            _note(attempt, usage)
            if usage.status == 0 and stage.config is not None and not self._adopt(stage, entry):
                attempt.status = "failed"
        if attempt.status != "finished":
            raise LightningLMError(self._failure(f"The stage {stage.name!r}", usage.status, self.log(stage)))

    def _entry(self, stage: Stage) -> StageRecord:
        """Return the record of a stage; a new one if there is none, or it is of another command or of a lost run."""
        entry = self.record.stages.get(stage.name)
        if entry is None or self._is_lost(entry) or entry.digest != self._digests[stage.name]:
            entry = StageRecord(digest=self._digests[stage.name], known_runs=[run.name for run in self._runs(stage)])
            self.record.stages[stage.name] = entry
        return entry

    def _is_lost(self, entry: StageRecord) -> bool:
        return entry.checkpoint is not None and not (self.output / entry.checkpoint).exists()

    def _measure(self, stage: Stage, name: str, checkpoint: str | None) -> None:
        """Measure a checkpoint, unless the same was measured already."""
        if not self.road.scores and not self.road.prompts:
            return
        job = {
            "result": str(self.result(name)),
            "checkpoint": checkpoint,
            "commands": self._score_commands(stage, checkpoint),
            "prompts": self.road.prompts,
            "temperature": self.road.temperature,
        }
        text = json.dumps(job, indent=1)
        key = hashlib.sha256(f"{text}{self._digests[stage.name]}".encode()).hexdigest()[:16]
        path, log = self.result(name).with_suffix(f".{key}.job"), self.log(stage).with_suffix(".scores.log")
        if path.exists() and self.result(name).exists():
            return
        with replacing(path.with_suffix(".json")) as file:
            file.write(text.encode())
        entry = self._entry(stage)
        self._progress.say(f"scores and samples of {name if checkpoint is None else stage.name}")
        with self._attempt(entry.measuring, log) as (attempt, tick):
            usage = self._runner.measure(path.with_suffix(".json"), log, tick)
            _note(attempt, usage)
        if usage.status != 0:
            raise LightningLMError(self._failure(f"Measuring {name!r}", usage.status, log))
        for old in path.parent.glob(f"{name}.*.job"):
            old.unlink()
        path.with_suffix(".json").rename(path)

    def _score_commands(self, stage: Stage, checkpoint: str | None) -> dict[str, tuple[list[str], list[str]]]:
        if checkpoint is not None:
            return {s.name: (s.command(self.output, checkpoint), list(s.metrics)) for s in self.road.scores}
        # An untrained model has no checkpoint: the first stage builds it, and the scores of its recipe measure it.
        words = [*stage.command(self.output, verb="validate"), "--trainer.logger", "false"]
        same = [score for score in self.road.scores if score.config == stage.config]
        commands = {s.name: ([*words, *s.options(self.output)], list(s.metrics)) for s in same}
        tasks = {s.name: (s.evaluation(self.output), list(s.metrics)) for s in self.road.scores if s.config is None}
        return {**(commands or {UNTRAINED: (words, [])}), **tasks}

    def _runs(self, stage: Stage) -> list[Path]:
        runs = (self.output / "runs" / stage.name).glob("version_*")
        return sorted(
            (run for run in runs if re.fullmatch(r"version_\d+", run.name)), key=lambda run: int(run.name[8:])
        )

    def _own_runs(self, stage: Stage, entry: StageRecord) -> list[Path]:
        return [run for run in self._runs(stage) if run.name not in entry.known_runs]

    def run_folder(self, stage: Stage) -> Path | None:
        """Return the last folder in which a stage was trained.

        Args:
            stage: A stage of the road.
        """
        entry = self.record.stages.get(stage.name)
        return next(reversed(self._own_runs(stage, entry)), None) if entry is not None else None

    def _adopt(self, stage: Stage, entry: StageRecord) -> bool:
        """Take over a run that has finished, also one whose road was killed before it could note that."""
        for run in reversed(self._own_runs(stage, entry)):
            found = run_record(run) or {}
            if found.get("status") == "finished" and (run / str(found.get("checkpoint"))).exists():
                entry.checkpoint = str((run / found["checkpoint"]).relative_to(self.output))
                if entry.attempts:
                    entry.attempts[-1].status = "finished"
                return bool(entry.attempts)
        return False

    @contextlib.contextmanager
    def _attempt(self, attempts: list[Attempt], log: Path) -> Iterator[tuple[Attempt, Tick]]:
        """Record a process from its start on: a kill at any moment loses no more than five seconds of its cost."""
        attempt = Attempt()
        attempts.append(attempt)
        self.record.save()
        saved_s = 0.0

        def tick(wall_s: float, cpu_s: float) -> None:
            nonlocal saved_s
            attempt.wall_s, attempt.cpu_s = wall_s, max(cpu_s, attempt.cpu_s)
            if wall_s - saved_s > _SAVE_EVERY_S:
                saved_s = wall_s
                self.record.save()
            self._progress.tick(lambda: last_line(log))

        try:
            yield attempt, tick
        except RunStopped:
            attempt.status = "stopped"
            self._progress.end()
            sys.stderr.write(f"Stopped. Continue with: {self.command}\n")
            raise
        finally:
            attempt.status = "failed" if attempt.status == "running" else attempt.status
            self.record.save()

    def _failure(self, what: str, status: int, log: Path) -> str:
        self._progress.end()
        how = f"ended with status {status}"
        if status < 0:
            name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
            how = f"was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
        return f"{what} {how}: {last_line(log)}\n  All of its output: {log}\n  Continue with: {self.command}"


def _note(attempt: Attempt, usage: Usage) -> None:
    attempt.wall_s, attempt.cpu_s, attempt.memory_bytes = usage.wall_s, usage.cpu_s, usage.memory_bytes
    attempt.status = "finished" if usage.status == 0 else "failed"


def _chained(road: Road) -> Iterator[tuple[str, str]]:
    """Yield a digest of each stage and of all before it: a stage is run again when one of these has changed."""
    above = ""
    for stage in road.stages:
        above = hashlib.sha256(f"{above}{stage.digest()}".encode()).hexdigest()[:16]
        yield stage.name, above
