"""Runs a program that a model wrote, in a process that can reach nothing.

The process sees no network, no file but Python's own, no other process, and has limits on CPU time, memory and output.
See `sandbox_child` for how; this file starts it, waits, and tells what came of it.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Part

__all__ = ["Sandbox", "SandboxResult"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_OUTPUT_LIMIT = 1 << 20
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")


@dataclass(frozen=True)
class SandboxResult:
    """What came of a program.

    Args:
        exit_code: 0 for success, negative for the signal that ended it.
        stdout: What it printed, at most 1 MiB.
        stderr: What it printed as errors, at most 1 MiB.
        timed_out: It was ended because the wall-clock limit had passed.
    """

    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool

    @property
    def ok(self) -> bool:
        """Whether the program ran to its end without an error."""
        return self.exit_code == 0 and not self.timed_out


@dataclass(frozen=True, kw_only=True)
class Sandbox(Part):
    """Limits of a program that nobody has read.

    Args:
        time_s: Wall-clock and CPU limit. Seconds.
        memory_mb: Address space. MiB; Python itself needs about 50.

    Raises:
        ConfigurationError: On the first run, if the machine offers no Landlock and seccomp (Linux 5.13 or later).
    """

    time_s: float = 5.0
    memory_mb: int = 256

    def run(self, program: str, *, stdin: str = "") -> SandboxResult:
        """Run a Python program and wait for its end.

        Args:
            program: Its source.
            stdin: What it may read from standard input.
        """
        _require_support()
        return self._run(program.encode("utf-8", "surrogatepass"), stdin.encode())

    def _run(self, source: bytes, stdin: bytes) -> SandboxResult:
        with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
            paths = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
            paths[0].write_bytes(source + stdin)
            workplace = Path(folder, "work")
            workplace.mkdir()
            with paths[0].open("rb", buffering=0) as given, paths[1].open("wb") as out, paths[2].open("wb") as err:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(_CHILD), json.dumps(self._limits(source))],
                    stdin=given,
                    stdout=out,
                    stderr=err,
                    cwd=workplace,
                    env={"LC_ALL": "C.UTF-8"},
                    start_new_session=True,
                )
                timed_out = _wait(process, self.time_s)
            return SandboxResult(process.returncode, _text(paths[1]), _text(paths[2]), timed_out)

    def _limits(self, source: bytes) -> dict[str, object]:
        return {
            "cpu_s": max(1, int(self.time_s) + 1),
            "memory_bytes": self.memory_mb << 20,
            "file_bytes": _OUTPUT_LIMIT,
            "program_bytes": len(source),
            "readable": [*_SYSTEM_LIBRARIES, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")],
        }


def _wait(process: "subprocess.Popen[bytes]", time_s: float) -> bool:
    """Wait for the end, or end the process and its group; tell whether that was needed."""
    try:
        process.wait(time_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def _text(path: Path) -> str:
    return path.read_bytes()[:_OUTPUT_LIMIT].decode("utf-8", "replace")


@cache
def _require_support() -> None:
    """Prove once that the walls stand: opening a socket or a file outside must fail, a harmless program must not."""
    if platform.system() == "Linux":
        limits = Sandbox(time_s=20)
        probes = [b"print('in')", b"import socket; socket.socket()", b"open('/etc/passwd')"]
        harmless, network, files = (limits._run(probe, b"") for probe in probes)
        if harmless.ok and "PermissionError" in network.stderr and "PermissionError" in files.stderr:
            return
        reason = f"the walls do not hold here: {harmless.stderr[-300:] or 'a forbidden action succeeded'}"
    else:
        reason = f"it needs Linux's Landlock and seccomp; this is {platform.system()}"
    raise ConfigurationError(
        f"Code cannot be run safely on this machine: {reason}. Use Linux 5.13 or later on x86-64 or 64-bit Arm, or a "
        "reward that asks a server of your own to run the code."
    )
