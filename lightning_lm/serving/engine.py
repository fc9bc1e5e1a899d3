"""The engine: one thread that owns the model and computes the completions of all requests together."""

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
from lightning_lm.serving.request import EngineStopped, GenerationRequest, QueueFull, TimedOut, Update
from lightning_lm.serving.scheduler import ContinuousBatch, Scheduler, StaticBatch

__all__ = ["Engine"]


class Engine:
    """Computes completions for many clients over one model.

    A `lightning_lm.models.Transformer` is batched continuously: requests join and leave the running batch at every
    step. Other models, those of ``transformers`` among them, are run in batches that start together. A greedy
    completion does not depend on the other requests, up to the rounding of floating point: in float32 the tokens are
    those of `lightning_lm.generation.Generator` alone. A sampled one depends on its seed and its own logits only.

    Args:
        model: Language model; the engine keeps it in evaluation mode while it runs.
        tokenizer: That of the model.
        max_batch: Most requests that are computed together.
        max_waiting: Most requests that wait for a place.
        prefix_bytes: Memory for keys and values of the beginnings of earlier prompts. Bytes; 0 for none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        max_waiting: int = 256,
        prefix_bytes: int = 256 << 20,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.is_continuous = supports_slots(model)
        self._scheduler: Scheduler = (
            ContinuousBatch(model, tokenizer, max_rows=max_batch, prefix_bytes=prefix_bytes)
            if self.is_continuous
            else StaticBatch(model, tokenizer, max_rows=max_batch)
        )
        self._waiting: deque[GenerationRequest] = deque()
        self._changes: deque[tuple[Callable[[], None], threading.Event]] = deque()
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
            QueueFull: If too many wait already.
            EngineStopped: If the engine does not run.
        """
        with self._condition:
            if not self.is_alive:
                raise EngineStopped("The engine has stopped; start the server again.")
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

    def change(self, function: Callable[[], None]) -> None:
        """Run a function while no request is computed, such as one that replaces weights; returns once it has run.

        Requests in the batch are finished first, and waiting ones wait. Earlier keys and values are dropped.

        Args:
            function: Called in the engine's thread; must not raise.

        Raises:
            EngineStopped: If the engine stops before.
        """
        done = threading.Event()
        with self._condition:
            if not self.is_alive:
                raise EngineStopped("The engine has stopped; start the server again.")
            self._changes.append((function, done))
            self._condition.notify()
        while not done.wait(timeout=1.0):
            if not self.is_alive:
                raise EngineStopped("The engine stopped before the change.")

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                for context in (evaluating(self.model), few_rows_products(self.model), torch.inference_mode()):
                    stack.enter_context(context)
                while self._prepare():
                    self._scheduler.step(deque() if self._changes else self._waiting)
        finally:  # whatever ended the loop, no client waits forever
            self._stopping = True
            stopped = EngineStopped("The engine has stopped; see the server's output.")
            for request in [*(row.request for row in self._scheduler.rows), *self._waiting]:
                self._end(request, Update(error=stopped))

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
        if self._changes and not self._scheduler.rows:
            function, done = self._changes.popleft()
            function()
            self._scheduler.forget()
            done.set()
        return True

    def _give_up_late(self) -> None:
        now = time.monotonic()
        for request in [*(row.request for row in self._scheduler.rows), *self._waiting]:
            if request.deadline_s is not None and now > request.deadline_s:
                late = TimedOut("The request took longer than its time limit. Ask for fewer tokens, or try again.")
                self._end(request, Update(error=late))

    def _end(self, request: GenerationRequest, update: Update) -> None:
        if not (request.is_done or request.is_cancelled):
            request.is_done = True
            request.deliver(update)
