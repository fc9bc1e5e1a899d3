"""A pytest plugin under which every ordinary Trainer of a suite uses one strategy, in one process or on several ranks.

Ranks are processes that run the same tests in step: before each test they agree on a port and a folder, and meet again
after it, so that a test that fails on one rank does not disturb the next one. `compare_strategies.py` starts them.
"""

import functools
import json
import os
import signal
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import distributed

from lightning_lm.strategies import ShardedOptimizerStrategy

ORDINARY = (None, "auto", "ddp", "ddp_spawn", "ddp_fork")
"""Strategies of a test that another one takes the place of."""
PATIENCE = timedelta(seconds=30)
"""Time after which a rank that waits for others fails."""


def make_strategy(name: str) -> Strategy:
    """Return a new strategy by its name.

    Args:
        name: "ddp", "zero1" or "zero2".
    """
    if name == "ddp":
        return DDPStrategy(timeout=PATIENCE)
    return ShardedOptimizerStrategy(stage={"zero1": 1, "zero2": 2}[name], timeout=PATIENCE)


def replaced(settings: dict[str, Any], name: str, num_ranks: int) -> dict[str, Any]:
    """Return settings of a Trainer with the strategy in place of an ordinary one on this number of processes.

    Args:
        settings: What the test gives.
        name: As for `make_strategy`.
        num_ranks: Number of processes.
    """
    ordinary = settings.get("strategy") in ORDINARY and settings.get("accelerator") in (None, "auto", "cpu")
    fits = settings.get("devices", "auto") in ("auto", 1, "1", num_ranks) and settings.get("num_nodes", 1) == 1
    started = num_ranks == 1 or "LOCAL_RANK" in os.environ  # else a test took the ranks away from the environment
    if not (ordinary and fits and started):
        return settings
    return {**settings, "strategy": make_strategy(name), "accelerator": "cpu", "devices": num_ranks}


class _Ranks:
    """What one rank agrees on with the others between tests."""

    def __init__(self, rank: int, num_ranks: int, port: int) -> None:
        self.rank, self.num_ranks, self._count = rank, num_ranks, 0
        self._store = distributed.TCPStore("localhost", port, is_master=False, timeout=timedelta(minutes=10))

    def meet(self) -> int:
        """Wait for the others, and return a free port that the first of them found."""
        self._count += 1
        key = str(self._count)
        if self.rank == 0:
            with socket.socket() as listening:
                listening.bind(("localhost", 0))
                self._store.set(f"{key} port", str(listening.getsockname()[1]))
        if self._store.add(f"{key} arrived", 1) == self.num_ranks:
            self._store.set(f"{key} all", "")
        self._store.wait([f"{key} all"])
        return int(self._store.get(f"{key} port"))


class Plugin:
    """Hooks and fixtures for one process."""

    def __init__(self, config: pytest.Config) -> None:
        self._name, self._num_ranks = config.getoption("--under"), config.getoption("--ranks")
        self._outcomes, self._folder = Path(config.getoption("--outcomes")), Path(config.getoption("--folder"))
        self._seconds = config.getoption("--seconds")
        rank = int(os.environ.get("LOCAL_RANK", 0))
        store = config.getoption("--store")
        self._ranks = _Ranks(rank, self._num_ranks, store) if store else None
        self._count = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        """Run a test when all ranks are there, and stop it after a while."""
        self._count += 1
        if self._ranks:
            os.environ["MASTER_PORT"] = str(self._ranks.meet())
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(self._seconds)
        try:
            return (yield)
        finally:
            signal.alarm(0)
            if distributed.is_initialized():
                distributed.destroy_process_group()

    @pytest.fixture
    def tmp_path(self) -> Path:
        """Return a new folder that is the same on all ranks."""
        path = self._folder / str(self._count)
        path.mkdir(parents=True, exist_ok=True)
        return path

    @pytest.fixture(autouse=True)
    def _strategy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        initialize = Trainer.__init__

        @functools.wraps(initialize)
        def with_strategy(trainer: Trainer, *args: Any, **settings: Any) -> None:
            initialize(trainer, *args, **replaced(settings, self._name, self._num_ranks))

        monkeypatch.setattr(Trainer, "__init__", with_strategy)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write down how each phase of a test ended."""
        said = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
        line = {"test": report.nodeid, "phase": report.when, "outcome": report.outcome, "said": "".join(said)}
        with self._outcomes.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _too_long(*_: object) -> None:
    raise TimeoutError("The test takes too long.")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `compare_strategies.py` sets."""
    group = parser.getgroup("compare_strategies")
    group.addoption("--under", default="ddp", help="ddp, zero1 or zero2")
    group.addoption("--ranks", type=int, default=1, help="number of processes")
    group.addoption("--store", type=int, default=0, help="port of the store that ranks meet at")
    group.addoption("--outcomes", required=True, help="file to write")
    group.addoption("--folder", required=True, help="folder for temporary files, the same on all ranks")
    group.addoption("--seconds", type=int, default=120, help="limit for a test")


def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks."""
    config.pluginmanager.register(Plugin(config))
