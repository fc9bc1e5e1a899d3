"""Runs a program that a model wrote, in a process with nothing to reach.

On every machine that is not refused the program has: no network, no other process to start or to signal, no system call
but those a plain Python program needs, no capability and not the user id 0, no file to read but Python's own library,
no descriptor but its standard streams, and limits on CPU time, memory, threads and output. With user namespaces, which
most kernels give, it also has a root folder of its own, where other files do not exist, and an empty work folder of 16
MiB in memory, which ends with it. Without them it cannot write files, and can ask whether a path exists; a warning says
so once. The walls are tried at the first run.

It shares the kernel with the training run: a fault of the kernel in one of the allowed calls is not kept out. For that,
judge programs on a machine of its own.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning_lm.errors import ConfigurationError
from lightning_lm.parts import Limit, Part

__all__ = ["Sandbox", "SandboxResult"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_OUTPUT_LIMIT = 1 << 20
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")


@dataclass(frozen=True)
class SandboxResult:
    """Result of a program.

    Args:
        exit_code: 0 for success, negative for the signal that ended it.
        stdout: Standard output, at most 1 MiB.
        stderr: Standard error, at most 1 MiB.
        timed_out: True if it was ended by the wall-clock limit.
    """

    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool

    @property
    def ok(self) -> bool:
        """True if the program ran to its end without an error."""
        return self.exit_code == 0 and not self.timed_out


@dataclass(frozen=True, kw_only=True)
class Sandbox(Part, limits={"time_s": Limit.POSITIVE, "memory_mb": Limit.COUNT}):
    """Limits of an untrusted program.

    Args:
        time_s: Wall-clock and CPU limit, seconds.
        memory_mb: Address space, MiB; Python itself needs about 50.

    Raises:
        ConfigurationError: On the first run, if the machine has not what the box needs (Linux 5.13 or later).
    """

    time_s: float = 5.0
    memory_mb: int = 256

    def run(self, program: str, *, stdin: str = "") -> SandboxResult:
        """Run a Python program and wait for its end.

        Args:
            program: Its source.
            stdin: Standard input of the program.
        """
        _require_support()
        return self._run(program.encode("utf-8", "surrogatepass"), stdin.encode("utf-8", "surrogatepass"))[0]

    def _run(self, source: bytes, stdin: bytes) -> tuple[SandboxResult, dict[str, bool]]:
        """Run a program; also return which walls the kernel gave."""
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
            files = {name: Path(folder, name) for name in ("stdin", "stdout", "stderr", "report")}
            files["stdin"].write_bytes(stdin)
            with (
                files["stdin"].open("rb", buffering=0) as given,
                files["stdout"].open("wb") as out,
                files["stderr"].open("wb") as err,
            ):
                streams = {"stdin": given, "stdout": out, "stderr": err}
                process = self._start(source, Path(folder), streams, cpu_s=max(1, int(self.time_s) + 1))
                timed_out = _wait(process, self.time_s)
            walls = json.loads(files["report"].read_text() or "{}")
            result = SandboxResult(process.returncode, _text(files["stdout"]), _text(files["stderr"]), timed_out)
            return result, walls

    def serve(self, program: str, folder: Path, *, readable: Sequence[str] = ()) -> "subprocess.Popen[bytes]":
        """Start a Python program that reads requests from its standard input, through a pipe, and writes the results.

        It may compute for a day; whoever waits for a result limits the time.

        Args:
            program: Its source.
            folder: Empty folder, needed as long as the process lives.
            readable: Files and folders that it may read besides Python's own library.
        """
        _require_support()
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return self._start(program.encode(), folder, streams, cpu_s=86_400, readable=readable)

    def _start(
        self, source: bytes, folder: Path, streams: Mapping[str, Any], *, cpu_s: int, readable: Sequence[str] = ()
    ) -> "subprocess.Popen[bytes]":
        root = folder / "root"
        root.mkdir()
        (folder / "program").write_bytes(source)
        with (folder / "program").open("rb") as program, (folder / "report").open("wb") as report:
            settings = {
                "cpu_s": cpu_s,
                "memory_bytes": self.memory_mb << 20,
                "file_bytes": _OUTPUT_LIMIT,
                "program_fd": program.fileno(),
                "report_fd": report.fileno(),
                "root": str(root),
                "readable": [
                    *_SYSTEM_LIBRARIES,
                    sysconfig.get_path("stdlib"),
                    sysconfig.get_path("platstdlib"),
                    *readable,
                ],
            }
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_CHILD), json.dumps(settings)],
                **streams,
                bufsize=0,
                pass_fds=(program.fileno(), report.fileno()),
                cwd=root,
                env={"LC_ALL": "C.UTF-8"},
                start_new_session=True,
            )


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
    """Probe the walls once: forbidden actions must fail, a harmless program must not; say what is missing."""
    if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64"):
        limits = Sandbox(time_s=30)
        harmless, walls = limits._run(b"print('in')", b"")
        probe, _ = limits._run(_PROBE.encode(), b"")
        if harmless.ok and probe.ok:
            if not walls["namespaces"]:
                warnings.warn(
                    "This kernel gives no user namespaces here (in containers, allow them with --security-opt "
                    "seccomp=unconfined): programs of completions cannot write files, and can see which files exist.",
                    stacklevel=2,
                )
            return
        reason = f"the walls do not hold here: {(harmless.stderr + probe.stderr)[-300:] or walls}"
    else:
        reason = f"it needs Linux on x86-64 or 64-bit Arm; this is {platform.system()} on {platform.machine()}"
    raise ConfigurationError(
        f"Code cannot be run safely on this machine: {reason}. Use Linux 5.13 or later with user namespaces (as root, "
        "they are required) or Landlock, or a reward that asks a server of your own to run the code."
    )


_PROBE = """
import os, signal, socket, ctypes
def refused(action):
    try:
        action()
    except OSError:
        return
    raise SystemExit(f"{action} was not refused")
refused(lambda: socket.socket())
refused(lambda: open("/etc/passwd"))
refused(lambda: os.fork())
refused(lambda: os.kill(os.getppid() or 1, 0))
refused(lambda: os.chmod("/tmp", 0o777))
refused(lambda: os.mknod("node", 0o600 | 0o60000, os.makedev(8, 0)))
assert os.getuid() != 0
"""
