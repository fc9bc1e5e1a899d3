"""Signals that ask a run to stop: SIGTERM, SIGINT and SIGUSR1.

The first one is noted, and the run stops at its next safe point: the end of an optimizer step or of a validation batch,
or at once in a block that changes nothing (`StopSignals.at_once`). A handler must not do more: a collective operation
inside a handler meets whatever the other ranks are at, and hangs. A second signal ends the process at once, also while
its main thread waits for a rank that is gone: a thread of its own sees the signals through Python's wake-up pipe.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer

from lightning_lm.distributed import Ranks
from lightning_lm.errors import RunStopped

__all__ = ["SIGNALS", "go_on_together", "interruptible", "stop_signals", "stop_together"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if os.name == "posix" else (signal.SIGINT,)
_SAME_S = 1.0
"""Signals that arrive within this time are one: terminals and launchers both pass a signal on."""


class StopSignals:
    """The signals of this process, while a run is under way.

    Attributes:
        received: Number of the signal that asked the run to stop; 0 if none did.
    """

    def __init__(self) -> None:
        self.received = 0
        self._first_s: float | None = None
        self._raises = False
        self._announce: Callable[[str], Any] = _nobody
        self._kill: Callable[[int], Any] = _nobody
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    @property
    def installed(self) -> bool:
        """True if signals are noted here."""
        return bool(self._previous)

    def install(
        self,
        *,
        kill: Callable[[int], Any] | None = None,
        announce: Callable[[str], Any] | None = None,
        leave_alone: frozenset[int] = frozenset(),
    ) -> None:
        """Raise `RunStopped` at the first signal, until `defer` is called.

        Handlers that the user has set stay: SIGTERM calls them too, other signals are theirs alone.

        Args:
            kill: Sends a signal to the processes that this one has launched.
            announce: Is told the name of the signal, in another thread.
            leave_alone: Signals that somebody else handles.
        """
        self._kill, self._announce = kill or self._kill, announce or self._announce
        if self.installed or threading.current_thread() is not threading.main_thread():
            return
        self.received, self._first_s, self._raises = 0, None, True
        for signum in SIGNALS:
            previous = signal.getsignal(signum)
            ours = previous in (signal.SIG_DFL, signal.default_int_handler)
            if signum not in leave_alone and (ours or (signum == signal.SIGTERM and callable(previous))):
                self._previous[signum] = signal.signal(signum, self._note)
        self._listen()

    def restore(self) -> None:
        """Give the signals back."""
        for signum, previous in self._previous.items():
            if signal.getsignal(signum) == self._note:
                signal.signal(signum, previous)
        if self._pipe is not None and self._thread is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])
            self._thread.join()  # or it could take a signal of this run for one of the next
            self._pipe = self._thread = None
        self.received = 0
        self._previous, self._kill, self._announce = {}, _nobody, _nobody

    @contextlib.contextmanager
    def handled(self, *, kill: Callable[[int], Any] | None = None) -> Iterator[None]:
        """Raise `RunStopped` at a signal that arrives within this block; see `install`.

        Args:
            kill: Sends a signal to the processes that this one has launched.
        """
        self.install(kill=kill)
        try:
            yield
        finally:
            self.restore()

    def defer(self) -> None:
        """Only note a signal from now on; the run stops at its next safe point."""
        self._raises = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `RunStopped` wherever this block is when a signal arrives, or has arrived.

        The block must not change the state of the run, and must not call collective operations.
        """
        before, self._raises = self._raises, bool(self._previous)
        try:
            if self.received:
                raise RunStopped(self.received)
            yield
        finally:
            self._raises = before

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = self.received or signum
        if self._pipe is None:
            self._count(signum)
        previous = self._previous.get(signum)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(signum, frame)
        if self._raises:
            self._raises = False
            raise RunStopped(self.received)

    def _count(self, signum: int) -> None:
        """Pass the first signal on, and end the process at the second."""
        now, name = time.monotonic(), signal.Signals(signum).name
        if self._first_s is None:
            self._first_s, self.received = now, self.received or signum
            self._kill(signum)
            self._announce(name)
        elif now - self._first_s > _SAME_S:
            self._kill(signal.SIGKILL)
            os.write(2, f"\nStopped at once by a second signal ({name}).\n".encode())
            os._exit(128 + signum)

    def _listen(self) -> None:
        """Start the thread, unless an event loop of the user has the wake-up pipe."""
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        other = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        if other != -1:
            signal.set_wakeup_fd(other)
            os.close(reads)
            os.close(writes)
            return
        self._pipe = reads, writes
        self._thread = threading.Thread(target=self._watch, args=(reads,), name="stop-signals", daemon=True)
        self._thread.start()

    def _watch(self, reads: int) -> None:
        while received := os.read(reads, 1):
            if received[0] in self._previous:
                self._count(received[0])
        os.close(reads)

    def forget(self) -> None:
        """Take the default actions in a forked process: a signal for it is none for the run."""
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        self._previous, self._raises, self._kill = {}, False, _nobody
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for end in self._pipe:
                os.close(end)
            self._pipe = self._thread = None


def _nobody(_: Any) -> None:
    """Tell nobody."""


stop_signals = StopSignals()
"""The signals of this process; handlers are one for all its threads and runs."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=stop_signals.forget)


@contextlib.contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Stop the run, all ranks together, at a signal that arrives within this block; a long block ends early.

    Nothing that the block does may change the state of the run, and on several ranks nothing in it may be a collective
    operation. Collective at its end: call on all ranks.

    Args:
        trainer: The Trainer of the run.

    Raises:
        RunStopped: On all ranks, if one of them was asked to stop.
    """
    with contextlib.suppress(RunStopped), stop_signals.at_once():
        yield
    signum = stop_signals.received if trainer.world_size == 1 else Ranks(trainer).largest(stop_signals.received)
    if signum:
        raise RunStopped(signum, agreed=True)


def stop_together(signum: int) -> None:
    """Stop the run if ranks have agreed to.

    Args:
        signum: The signal that they have agreed on; 0 to go on.

    Raises:
        RunStopped: If there is one.
    """
    if signum:
        raise RunStopped(signum, agreed=True)


def go_on_together(ranks: Ranks, unfinished: bool) -> bool:
    """Return whether a rank has something left to do; stop the run if one of them has received a signal. Collective.

    Args:
        ranks: All of them ask equally often.
        unfinished: True if this one has something left.

    Raises:
        RunStopped: On all ranks, if one of them was asked to stop.
    """
    signum, others = divmod(ranks.largest(2 * stop_signals.received + unfinished), 2)
    stop_together(signum)
    return bool(others)
