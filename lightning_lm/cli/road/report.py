"""The report of a road as plain data: what each stage was, what it cost, its curves, scores and samples."""

import json
import os
import platform
import shlex
import time
from typing import Any

from lightning_lm import __version__
from lightning_lm.cli.road.curves import Run, read_run
from lightning_lm.cli.road.drive import UNTRAINED, Drive
from lightning_lm.cli.road.page import report_page
from lightning_lm.cli.road.plan import Stage
from lightning_lm.storage import replacing
from lightning_lm.storage.json_text import parse_json

__all__ = ["RoadReport"]


class RoadReport:
    """Writes ``report.json`` and ``report.html`` of what a road has done so far.

    Args:
        drive: The run of the road.
    """

    def __init__(self, drive: Drive) -> None:
        self._drive = drive

    def write(self) -> None:
        """Replace both files."""
        content = self.content()
        with replacing(self._drive.output / "report.json") as file:
            file.write(json.dumps(content, indent=1).encode())
        with replacing(self._drive.output / "report.html") as file:
            file.write(report_page(content).encode())

    def content(self) -> dict[str, Any]:
        """Return what is reported."""
        drive, road = self._drive, self._drive.road
        stages = [self._stage(stage) for stage in road.stages if stage.name in drive.record.stages]
        return {
            "title": road.title,
            "version": __version__,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
            "command": drive.command,
            "output": str(drive.output),
            "prompts": list(road.prompts),
            "metrics": [metric for score in road.scores for metric in score.metrics],
            "untrained": self._measured(UNTRAINED),
            "stages": stages,
            "totals": {
                "wall_s": sum(stage["wall_s"] + stage["measuring_wall_s"] for stage in stages),
                "cpu_s": sum(stage["cpu_s"] + stage["measuring_cpu_s"] for stage in stages),
                "num_tokens": sum(stage["num_tokens"] or 0 for stage in stages),
                "memory_bytes": max((stage["memory_bytes"] for stage in stages), default=0),
            },
        }

    def _stage(self, stage: Stage) -> dict[str, Any]:
        drive = self._drive
        entry, folder = drive.record.stages[stage.name], drive.run_folder(stage) if stage.config else None
        run = Run({}, None) if folder is None else read_run(folder)
        status = entry.attempts[-1].status if entry.attempts else "waiting"
        scores = [
            shlex.join(["lightning-lm", *score.command(drive.output, drive.output / "runs" / stage.name)])
            for score in drive.road.scores
        ]
        return {
            "name": stage.name,
            "status": status,
            "command": shlex.join(entry.command),
            "score_commands": scores if stage.config else [],
            "wall_s": entry.wall_s,
            "cpu_s": entry.cpu_s,
            "memory_bytes": entry.memory_bytes,
            "measuring_wall_s": sum(attempt.wall_s for attempt in entry.measuring),
            "measuring_cpu_s": sum(attempt.cpu_s for attempt in entry.measuring),
            "attempts": len(entry.attempts),
            "num_tokens": run.num_tokens,
            "checkpoint": drive.checkpoint(stage),
            "log": str(drive.log(stage)),
            "curves": {
                name: {"steps": list(curve.steps), "values": list(curve.values)} for name, curve in run.curves.items()
            },
            **(self._measured(stage.name) if stage.config and entry.finished else {"scores": {}, "samples": []}),
        }

    def _measured(self, name: str) -> dict[str, Any]:
        try:
            found = parse_json(self._drive.result(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"scores": {}, "samples": []}
        return {
            "scores": {metric: value for score in found["scores"].values() for metric, value in score.items()},
            "samples": found["samples"],
        }
