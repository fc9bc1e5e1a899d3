"""The process that compares answers with sympy, which can take forever: it is ended when its time is up.

Started as a script by `answer_workers`, with the import path as JSON in its first argument. Each line on standard
input is a JSON object with ``given``, ``right`` and ``time_s``; each line of output is the verdict, or ``null`` if an
answer cannot be read and math-verify is not installed.
"""

import json
import logging
import os
import resource
import signal
import sys
import types
from pathlib import Path

__all__ = ["main"]

_MEMORY_BYTES = 4 << 30
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""Errors that sympy raises on expressions that it cannot handle."""


def _verdict(given: str, right: str) -> bool | None:
    from lightning_lm.rewards.comparison import compare_answers, verify_with_library

    try:
        verdict = compare_answers(given, right)
    except _UNREADABLE:
        verdict = None
    if verdict is not None:
        return verdict
    try:
        return verify_with_library(given, right)
    except ImportError:
        return None
    except _UNREADABLE:
        return False


def _prepare(search_path: list[str]) -> int:
    """Import everything before the clock runs, and return the descriptor of the verdicts, out of reach of prints."""
    verdicts = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path[:] = search_path
    logging.disable(logging.WARNING)  # math-verify warns that it has no time limit; the parent has one
    sys.setrecursionlimit(3000)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # The package's own __init__ would import torch, which takes seconds and is not needed here.
    package = types.ModuleType("lightning_lm.rewards")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules["lightning_lm.rewards"] = package
    _verdict("x+1", "1+x")
    _verdict(r"\mathbf{u}", r"\mathbf{v}")  # imports math-verify
    return verdicts


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    verdicts = _prepare(json.loads(sys.argv[1]))
    os.write(verdicts, b"ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        # The kernel ends this process if the parent is no longer there to do it.
        signal.setitimer(signal.ITIMER_REAL, request["time_s"] + 1)
        verdict = _verdict(request["given"], request["right"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(verdicts, json.dumps(verdict).encode() + b"\n")


if __name__ == "__main__":
    main()
