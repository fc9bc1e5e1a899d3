"""Memory that is free for keys and values."""

import os
from pathlib import Path

import torch

__all__ = ["free_bytes"]

_UNKNOWN = 8 << 30
"""Assumed where the system tells nothing. Bytes."""
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that nobody uses. Bytes.

    Args:
        device: The device of a model. For one that is no CUDA device, the free memory of the machine is returned.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_of_machine(), _free_of_group())


def _free_of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: half of all memory
        names = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if "SC_PHYS_PAGES" in names else _UNKNOWN


def _free_of_group() -> int:
    """Return what the memory limit of a container leaves, if there is one."""
    try:
        limit = int((_GROUP / "memory.max").read_text())
        return max(limit - int((_GROUP / "memory.current").read_text()), 0)
    except (OSError, ValueError):  # no control groups, or the limit "max"
        return 1 << 62
