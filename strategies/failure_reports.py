"""Failure reports between ranks: those that wait name the rank that failed."""

import logging
import sys
import threading
import time
import traceback
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_lm.errors import RunStopped
from lightning_lm.modules.signal_stop import SignalStop

__all__ = ["FailureReports", "_ReportingStrategy"]

_log = logging.getLogger(__name__)
_POLL_S, _GRACE_S = 0.25, 3.0
_BOARD_S = _GRACE_S + 3.0
"""Time limit for a failing rank to read and write the board."""
_ALARM = "alarm"
_SILENT = "it has died, is stopped, or hangs outside Python."


class FailureReports:
    """A store shared by all ranks, and a thread that writes its rank's stack there once another has failed.

    A rank that raises writes its traceback down. Those that waited for it fail too, with an error of the network or
    after the strategy's ``timeout``, and find on the board what the others are at: one that hangs is seen where it
    hangs, and one that is dead says nothing.

    Args:
        strategy: With its process group. All ranks must make theirs together.
    """

    def __init__(self, strategy: ParallelStrategy) -> None:
        self.rank, self.size = strategy.global_rank, strategy.world_size
        environment = strategy.cluster_environment
        assert environment is not None
        address = environment.main_address
        own = TCPStore(address, 0, is_master=True, wait_for_workers=False) if self.rank == 0 else None
        port = strategy.broadcast(0 if own is None else own.port)
        self._store = own or TCPStore(address, port, wait_for_workers=False)
        strategy.barrier()  # a rank 0 that fails at once would take the board away from those that still connect
        self._over = threading.Event()
        self._main = threading.get_ident()
        threading.Thread(target=self._watch, name="failure-reports", daemon=True).start()

    def _watch(self) -> None:
        try:
            while not self._over.wait(_POLL_S):
                if self._store.check([_ALARM]):
                    frame = sys._current_frames().get(self._main)
                    self._store.set(f"at {self.rank}", "".join(traceback.format_stack(frame)[-8:]))
                    return
        except distributed.DistError:
            pass  # rank 0 has gone, and the board with it

    def report(self, error: BaseException) -> list[str]:
        """Report this rank's error, and return what the others are doing if it timed out waiting for them.

        The board lies in the memory of rank 0, and its connections know no time limit: while rank 0 is stopped, or its
        machine gone, they would wait for it for ever. So all of it happens in a thread that may be left behind.

        Args:
            error: Error of this rank.
        """
        lines: list[str] | None = None

        def talk() -> None:
            nonlocal lines
            try:
                self.tell(error)
                lines = self.others() if _is_of_network(error) else []
            except distributed.DistError:
                pass  # the connection was closed

        thread = threading.Thread(target=talk, name="failure-report", daemon=True)
        thread.start()
        thread.join(_BOARD_S)
        if lines is not None:
            return lines
        return [f"Rank 0 of {self.size} does not respond: it has died or is stopped, or its machine cannot be reached."]

    def tell(self, error: BaseException) -> None:
        """Report this rank's error.

        Args:
            error: Error of this rank.
        """
        if not _is_of_network(error):
            text = "".join(traceback.format_exception(error)[-8:])
            self._store.set(f"error {self.rank}", text)
        self._store.set(f"failed {self.rank}", "yes")
        self._store.set(_ALARM, "yes")

    def others(self) -> list[str]:
        """Return a report of each rank that failed for a reason of its own."""
        deadline = time.monotonic() + _GRACE_S
        waiting = [rank for rank in range(self.size) if rank != self.rank]
        found = []
        while waiting and time.monotonic() < deadline:
            for rank in list(waiting):
                answer = self._answer(rank)
                if answer is not None:
                    waiting.remove(rank)
                    found.append(answer)
            time.sleep(_POLL_S / 5)
        return [
            *(line for line in found if line),
            *(f"Rank {rank} of {self.size} does not respond: {_SILENT}" for rank in waiting),
        ]

    def _answer(self, rank: int) -> str | None:
        who = f"Rank {rank} of {self.size}"
        if self._store.check([f"error {rank}"]):
            return f"{who} failed with\n{self._read(f'error {rank}')}"
        if self._store.check([f"failed {rank}"]):
            return ""
        if self._store.check([f"at {rank}"]):
            return f"{who} has not failed; it is at\n{self._read(f'at {rank}')}"
        return None

    def _read(self, key: str) -> str:
        content: bytes = self._store.get(key)
        return content.decode(errors="replace").rstrip()

    def close(self) -> None:
        """End the thread."""
        self._over.set()


def _is_of_network(error: BaseException) -> bool:
    """Return whether a rank fails because it waited for another one."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class _ReportingStrategy(Strategy):
    """Mix-in before a strategy for several processes: errors name the rank that they come from.

    The strategy's ``timeout`` bounds how long a rank waits for one that hangs, and also how much later than the first
    the last one may start; processes that die are seen at once, by Lightning's launcher and by torchrun too.
    """

    _reports: FailureReports | None = None

    def setup_environment(self) -> None:
        """Form the process group, and start the failure reports."""
        super().setup_environment()
        assert isinstance(self, ParallelStrategy)
        if self.lightning_module is not None:
            SignalStop.attach(self.lightning_module.trainer)
        if self._reports is None and self.world_size > 1:
            self._reports = FailureReports(self)

    def on_exception(self, exception: BaseException) -> None:
        """Add the rank to the error, since all ranks share a terminal, and what a rank it waited for is doing."""
        super().on_exception(exception)
        if isinstance(exception, RunStopped):
            return
        assert isinstance(self, ParallelStrategy)
        module = self.lightning_module
        steps = 0 if module is None else module.trainer.global_step
        exception.add_note(f"This was rank {self.global_rank} of {self.world_size}, after {steps} steps.")
        lines = [] if self._reports is None else self._reports.report(exception)
        if lines:
            _log.error("\n".join([f"Rank {self.global_rank} timed out.", *lines]))

    def teardown(self) -> None:
        """End the failure reports."""
        if self._reports is not None:
            self._reports.close()
        self._reports = None
        super().teardown()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without the connection."""
        return {**super().__getstate__(), "_reports": None}
