"""Child processes of a road: their cost, their log, signals, and a parent that is killed."""

import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from lightning_lm.cli.road.process import last_line, run_process
from lightning_lm.errors import RunStopped

PYTHON = sys.executable


def nothing(wall_s, cpu_s):
    """Look at no time."""


def test_the_cost_and_the_output_of_a_process(tmp_path):
    program = "import time\nx = bytearray(60_000_000)\nwhile time.process_time() < 0.3: pass\nprint('the end', end='')"
    usage = run_process([PYTHON, "-c", program], tmp_path / "logs" / "a.log", nothing)
    assert usage.status == 0
    assert 0.3 <= usage.cpu_s < 3
    assert usage.wall_s >= usage.cpu_s / 2
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # where the count of a child begins
    assert 60e6 < usage.memory_bytes < own + 600e6
    assert last_line(tmp_path / "logs" / "a.log") == "the end"


def test_a_failure_is_a_status_and_its_last_line_is_found(tmp_path):
    log = tmp_path / "a.log"
    assert run_process([PYTHON, "-c", "import sys; print('why', flush=True); sys.exit(3)"], log, nothing).status == 3
    assert last_line(log) == "why"
    assert run_process([PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"], log, nothing).status == -9
    assert last_line(tmp_path / "none.log") == "no output"
    assert run_process([PYTHON, "-c", ""], log, nothing).status == 0
    assert last_line(log) == "no output"  # not the command, nor what the process before it printed
    log.write_bytes(b"first\n 10 %\r 20 %\xff\n\n")
    assert last_line(log) == "20 %\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_ends_the_road_after_the_process(tmp_path, signum):
    program = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "got = signal.sigwait({1, 2, 15})\nprint('saved after', int(got), flush=True)"
    )
    mask = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {1, 2, 15}); print('ready', flush=True)\n"
    log, before = tmp_path / "a.log", signal.getsignal(signum)

    def when_ready(wall_s, cpu_s):
        if last_line(log) == "ready":
            log.open("a").write("asked\n")
            signal.raise_signal(signum)

    with pytest.raises(RunStopped) as stopped:
        run_process([PYTHON, "-c", mask + program], log, when_ready)
    assert stopped.value.code == 128 + signum
    assert last_line(log) == f"saved after {2 if signum == signal.SIGINT else 15}"
    assert signal.getsignal(signum) == before


def test_a_child_ends_with_a_road_that_is_killed(tmp_path):
    child = (
        "import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {15})\nprint(os.getpid(), flush=True)\n"
        "signal.sigwait({15})\nopen('told', 'w').close()"
    )
    parent = (
        "import sys; from pathlib import Path; from lightning_lm.cli.road.process import run_process\n"
        f"run_process([sys.executable, '-c', {child!r}], Path('a.log'), lambda wall_s, cpu_s: None)"
    )
    process = subprocess.Popen([PYTHON, "-c", parent], cwd=tmp_path)
    end_s = time.monotonic() + 60
    while not last_line(tmp_path / "a.log").isdecimal():
        assert time.monotonic() < end_s
        threading.Event().wait(0.05)
    process.kill()
    process.wait()
    while not (tmp_path / "told").exists():
        assert time.monotonic() < end_s
        threading.Event().wait(0.05)
