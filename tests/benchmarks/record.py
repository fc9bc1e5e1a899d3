"""Write the result of a benchmark where a claim can point at it."""

import datetime
import importlib.metadata
import json
import platform
import socket
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

Work = TypeVar("Work", bound=Hashable)

_PACKAGES = ("torch", "lightning", "transformers", "trl", "litgpt", "tokenizers", "tiktoken", "numpy")


def write_record(path: Path | str, *, command: str, results: dict) -> None:
    """Write the command, the device, versions, the date and the numbers as JSON."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    record = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "results": results,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def cpu_seconds(works: Iterable[Work], run: Callable[[Work], object], rounds: int) -> dict[Work, list[float]]:
    """Return the CPU time of each work in each round; they take turns, every other round in the opposite order."""
    times: dict[Work, list[float]] = {work: [] for work in works}
    for index in range(rounds):
        for work in times if index % 2 else reversed(times):
            start = time.process_time()
            run(work)
            times[work].append(time.process_time() - start)
    return times


def free_port() -> int:
    """Return a port of this machine on which nothing listens, for ranks to meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or 1} cores"
