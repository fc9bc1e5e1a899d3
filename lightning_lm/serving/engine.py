"""The engine: one thread that owns the model and computes the completions of all requests together."""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lightning_lm.generation.few_rows import few_rows_products
from lightning_lm.generation.generator import evaluating
from lightning_lm.generation.slots import supports_slots
from lightning_lm.protocols import Tokenizer
from lightning_lm.serving.memory import free_bytes
from lightning_lm.serving.request import (
    DoesNotFit,
    EngineStopped,
    GenerationRequest,
    QueueFull,
    TimedOut,
    failing,
)
from lightning_lm.serving.scheduler import ContinuousBatch, Scheduler, StaticBatch

__all__ = ["Engine"]


class Engine:
    """Computes completions for many clients over one model.

    A `lightning_lm.models.Transformer` is batched continuously: requests join and leave the running batch at every
    step. Other models, those of ``transformers`` among them, are run in batches that start together. A greedy
    completion does not depend on the other requests, up to the rounding of floating point: in float32 the tokens are
    those of `lightning_lm.generation.Generator` alone. A sampled one depends on its seed and its own logits only.

    A request at which the model or the tokenizer fails ends with an error, and the others go on. If the whole step
    fails, those that it computed end.

    Args:
        model: Language model; the engine keeps it in evaluation mode while it runs.
        tokenizer: That of the model.
        max_batch: Most requests that are computed together.
        max_waiting: Most requests that wait for a place.
        prefix_bytes: Memory for keys and values of the beginnings of earlier prompts. Bytes; 0 for none.
        cache_bytes: Memory for keys and values of the running requests; ``None`` for half of the free memory of the
            model's device. A request for which it does not suffice now waits. Bytes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        max_waiting: int = 256,
        prefix_bytes: int = 256 << 20,
        cache_bytes: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.is_continuous = supports_slots(model)
        self._scheduler: Scheduler
        if self.is_continuous:
            if cache_bytes is None:
                cache_bytes = free_bytes(model.head.weight.device) // 2
            self._scheduler = ContinuousBatch(
                model, tokenizer, max_rows=max_batch, prefix_bytes=prefix_bytes, cache_bytes=cache_bytes
            )
        else:
            self._scheduler = StaticBatch(model, tokenizer, max_rows=max_batch)
        self._waiting: deque[GenerationRequest] = deque()
        self._changes: deque[_Change] = deque()
        self._condition = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        """True while requests can be computed."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return sum(not row.is_done for row in tuple(self._scheduler.rows))

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return sum(not request.is_cancelled for request in tuple(self._waiting))

    @contextmanager
    def running(self) -> Iterator["Engine"]:
        """Run the engine's thread for as long as the context lasts."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        try:
            yield self
        finally:
            with self._condition:
                self._stopping = True
                self._condition.notify()
            self._thread.join()

    def submit(self, *requests: GenerationRequest) -> None:
        """Add requests, all of them or none.

        Args:
            *requests: Each is delivered its updates until the last one.

        Raises:
            DoesNotFit: If these are more than ever fit into the queue and the batch.
            QueueFull: If too many wait already.
            EngineStopped: If the engine does not run.
        """
        with self._condition:
            self._require_alive()
            if len(requests) > self.max_waiting + self.max_batch:
                raise DoesNotFit(
                    f"{len(requests)} completions at once are more than the queue ({self.max_waiting}) and the batch "
                    f"({self.max_batch}) take together. Ask for fewer, or start the server with a longer --queue."
                )
            if self.num_waiting + len(requests) > self.max_waiting + max(0, self.max_batch - self.num_running):
                raise QueueFull(
                    f"{self.num_waiting} requests wait already, and the queue takes {self.max_waiting}. Try again "
                    "later, or start the server with a longer --queue."
                )
            self._waiting.extend(requests)
            self._condition.notify()

    def cancel(self, *requests: GenerationRequest) -> None:
        """Give requests up; nothing more is delivered after the step that is under way.

        Args:
            *requests: Those that are done already are left alone.
        """
        with self._condition:
            for request in requests:
                request.is_cancelled = True
            self._condition.notify()

    def change(self, function: Callable[[], None], withdrawn: threading.Event | None = None) -> None:
        """Run a function while no request is computed, such as one that replaces weights; returns once it has run.

        Requests in the batch are finished first, and waiting ones wait. Earlier keys and values are dropped.

        Args:
            function: Called in the engine's thread; an exception of it is raised here.
            withdrawn: The function is not run any more once this is set.

        Raises:
            EngineStopped: If the engine stops before.
        """
        change = _Change(function, withdrawn or threading.Event())
        with self._condition:
            self._require_alive()
            self._changes.append(change)
            self._condition.notify()
        change.done.wait()
        if change.error is not None:
            raise change.error

    def wake(self) -> None:
        """Let the engine look for what was withdrawn."""
        with self._condition:
            self._condition.notify()

    def _require_alive(self) -> None:
        if not self.is_alive:
            raise EngineStopped("The engine has stopped; start the server again.")

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                for context in (evaluating(self.model), few_rows_products(self.model), torch.inference_mode()):
                    stack.enter_context(context)
                while self._prepare():
                    self._step()
        finally:  # whatever ended the loop, nobody waits forever
            with self._condition:
                self._stopping = True
                requests, changes = list(self._at_hand()), list(self._changes)
                self._waiting.clear()
            stopped = EngineStopped("The engine has stopped; see the server's output.")
            for request in requests:
                request.fail(stopped)
            for change in changes:
                change.error = stopped
                change.done.set()

    def _step(self) -> None:
        is_done = False
        with failing(self._concerned()):
            self._scheduler.step(deque() if self._changes else self._waiting)
            is_done = True
        if not is_done:
            self._scheduler.reset()

    def _concerned(self) -> Iterator[GenerationRequest]:
        """Yield the requests of a step that failed as a whole; of one without rows that is the next request."""
        rows = self._scheduler.rows
        yield from (row.request for row in rows) if rows else list(self._waiting)[:1]

    def _prepare(self) -> bool:
        """Wait for work, drop what is given up or too late, and make changes; return whether to go on."""
        with self._condition:
            while not (self._stopping or self._waiting or self._scheduler.rows or self._changes):
                self._condition.wait()
            if self._stopping:
                return False
            self._give_up_late()
            staying = [request for request in self._waiting if not (request.is_cancelled or request.is_done)]
            self._waiting.clear()
            self._waiting.extend(staying)
            self._drop_withdrawn()
        if self._changes and not self._scheduler.rows:
            change = self._changes.popleft()
            change.run()
            self._scheduler.forget()
            change.done.set()
        return True

    def _drop_withdrawn(self) -> None:
        for change in [change for change in self._changes if change.withdrawn.is_set()]:
            self._changes.remove(change)
            change.done.set()

    def _give_up_late(self) -> None:
        now = time.monotonic()
        for request in self._at_hand():
            if request.deadline_s is not None and now > request.deadline_s:
                request.fail(
                    TimedOut("The request took longer than its time limit. Ask for fewer tokens, or try again.")
                )

    def _at_hand(self) -> Iterator[GenerationRequest]:
        """Yield the requests of the batch, and those that wait."""
        yield from (row.request for row in self._scheduler.rows)
        yield from self._waiting


@dataclasses.dataclass(eq=False)
class _Change:
    """A function that runs between requests."""

    function: Callable[[], None]
    withdrawn: threading.Event
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    error: Exception | None = None

    def run(self) -> None:
        """Run the function; keep what it raises for the thread that waits."""
        try:
            self.function()
        except Exception as error:  # noqa: BLE001 - it is raised where the change was asked for
            self.error = error
