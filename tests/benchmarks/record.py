"""Write the result of a benchmark where a claim can point at it."""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

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


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or 1} cores"
