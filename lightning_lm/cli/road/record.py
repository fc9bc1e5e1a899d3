"""The record of a road, ``road.json`` in its folder: which stages have finished, with which command, at what cost."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.storage import replacing, verifies
from lightning_lm.storage.json_text import parse_json

__all__ = ["Attempt", "RoadRecord", "StageRecord"]

_VERSION = 1


@dataclass
class Attempt:
    """One process that worked on a stage.

    Args:
        started_s: Time at which it started, seconds since 1970.
        wall_s: Seconds that it took, as far as they were seen.
        cpu_s: Seconds on all cores, its own processes included.
        memory_bytes: Largest resident memory of one of its processes.
        status: "running", "finished", "failed" or "stopped"; one that was killed stays "running".
    """

    started_s: float = field(default_factory=time.time)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    memory_bytes: int = 0
    status: str = "running"


@dataclass
class StageRecord:
    """State of a stage.

    Args:
        digest: Digest of its command and of everything before it.
        command: Words of the last process, the program's name first.
        known_runs: Folders of runs that were there before; those of the stage are others.
        attempts: Processes that worked on it.
        measuring: Processes that measured its checkpoint.
        checkpoint: Last checkpoint, relative to the folder of the road, for a stage of training that has finished.
    """

    digest: str
    command: list[str] = field(default_factory=list)
    known_runs: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    measuring: list[Attempt] = field(default_factory=list)
    checkpoint: str | None = None

    @property
    def finished(self) -> bool:
        """True if its last process came to its end."""
        return bool(self.attempts) and self.attempts[-1].status == "finished"

    @property
    def wall_s(self) -> float:
        """Seconds of all attempts."""
        return sum(attempt.wall_s for attempt in self.attempts)

    @property
    def cpu_s(self) -> float:
        """CPU-seconds of all attempts."""
        return sum(attempt.cpu_s for attempt in self.attempts)

    @property
    def memory_bytes(self) -> int:
        """Largest memory of all attempts."""
        return max((attempt.memory_bytes for attempt in self.attempts), default=0)


class RoadRecord:
    """Records of all stages, and of the measurements, in one file that is replaced as a whole.

    Args:
        output: Folder of the road.

    Raises:
        ConfigurationError: If there is a file of that name that no road wrote.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / "road.json"
        self.stages: dict[str, StageRecord] = {}
        if not self.path.exists():
            return
        try:
            found = parse_json(self.path.read_text(encoding="utf-8"))
            if found["version"] != _VERSION:
                raise ValueError(f"it has version {found['version']}")
            if found.get("sha256", _digest(found["stages"])) != _digest(found["stages"]) and verifies():
                raise ValueError("it has changed since it was written")
            self.stages = {name: _stage(entry) for name, entry in found["stages"].items()}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ConfigurationError(
                f"{self.path} is no record that this release can continue ({error}). Use another --output, or remove "
                "it to start over: finished runs stay in their folders."
            ) from error

    def save(self) -> None:
        """Write the file in one step."""
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        with replacing(self.path) as file:
            content = {"version": _VERSION, "sha256": _digest(stages), "stages": stages}
            file.write(json.dumps(content, indent=1).encode())


def _digest(stages: object) -> str:
    return hashlib.sha256(json.dumps(stages, sort_keys=True).encode()).hexdigest()


def _stage(entry: dict[str, Any]) -> StageRecord:
    processes = {key: [Attempt(**attempt) for attempt in entry[key]] for key in ("attempts", "measuring")}
    return StageRecord(**{**entry, **processes})
