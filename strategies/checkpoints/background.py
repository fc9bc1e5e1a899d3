"""Asynchronous checkpoints: a thread writes them while training continues."""

import copy
import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.optim.memory import tensors_in
from lightning_lm.strategies.checkpoints.atomic import AtomicCheckpointIO

__all__ = ["BackgroundCheckpointIO"]


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Copies a checkpoint to CPU memory, and writes it in a thread while training continues.

    Training waits for the copy only. One thread works through saves and removals in order: no two files are written at
    once, and a file is removed only after the one that replaces it is complete and on the disk. So a kill at any moment
    leaves the previous checkpoint, as with `AtomicCheckpointIO`, and a failed write affects no other file. Its error is
    raised at the next save or load, or at the end of the run.

    The first save into a folder, and every save into one that holds a link, is waited for: a full or forbidden folder
    is known at once, and a ``last.ckpt`` that is a link (``save_last="link"``) never points at a file that is not
    there.

    Args:
        max_pending: Checkpoints that may wait in memory, the one that is being written included. A save beyond that
            waits for the oldest. 2 is right for callbacks that save the best and the last one after another.

    Raises:
        ConfigurationError: If ``max_pending`` is less than 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[BackgroundCheckpointIO()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, max_pending: int = 2) -> None:
        if max_pending < 1:
            raise ConfigurationError(f"max_pending={max_pending} would let nothing be saved; use at least 1.")
        super().__init__()
        self._max_pending = max_pending
        self._thread: ThreadPoolExecutor | None = None
        self._tasks: deque[_Task] = deque()
        self._known_folders: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Take a copy and have it written.

        Args:
            checkpoint: Tensors and plain data; may change as soon as this returns.
            path: Path of the checkpoint; folders are made.
            storage_options: Not used here.

        Raises:
            CheckpointError: If this one or an earlier one cannot be written.
        """
        folder = Path(path).parent.absolute()
        if folder not in self._known_folders or any(entry.is_symlink() for entry in folder.glob("*")):
            self._wait_for(0)
            super().save_checkpoint(checkpoint, path, storage_options)
            self._known_folders.add(folder)
            return
        self._wait_for(self._max_pending - 1)
        self._give(super().save_checkpoint, copied_to_cpu(checkpoint), path, storage_options, saves=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Have a file removed once everything that was saved before is on the disk."""
        self._give(super().remove_checkpoint, path, saves=False)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Wait for what is being written, then load; see `AtomicCheckpointIO.load_checkpoint`."""
        self._wait_for(0)
        return super().load_checkpoint(path, *args, **kwargs)

    def teardown(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            CheckpointError: If something cannot be written.
        """
        try:
            self._wait_for(0)
        finally:
            self._known_folders.clear()
            if self._thread is not None:
                self._thread.shutdown()
            self._thread = None

    def _give(self, work: Callable[..., None], *args: Any, saves: bool) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        before = self._tasks[-1] if self._tasks else None
        self._tasks.append(_Task(self._thread.submit(_after, before, work, *args), saves))

    def _wait_for(self, pending: int) -> None:
        """Wait until at most so many saves are pending; after an error, for all of them, and raise it."""
        while self._tasks and (self._tasks[0].future.done() or sum(task.saves for task in self._tasks) > pending):
            error = self._tasks.popleft().future.exception()
            if error is not None:
                while self._tasks:  # they were given up
                    self._tasks.popleft().future.exception()
                raise error


@dataclasses.dataclass(frozen=True)
class _Task:
    future: "Future[None]"
    saves: bool


def _after(before: _Task | None, work: Callable[..., None], *args: Any) -> None:
    """Do something unless what was asked for before has failed."""
    if before is not None and before.future.exception() is not None:
        raise CheckpointError("Given up, because an earlier checkpoint could not be written.")
    work(*args)


def copied_to_cpu(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with which nothing is shared, tensors on the CPU; tensors that share memory do so in the copy.

    Args:
        checkpoint: Tensors and plain data.
    """
    copies: dict[Any, Tensor] = {}
    memo: dict[int, Any] = {}
    for tensor in tensors_in(checkpoint):
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = copies[key]
    with torch.no_grad():
        return copy.deepcopy(checkpoint, memo)
