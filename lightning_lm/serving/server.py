"""The HTTP server: OpenAI's interface and the chat page, over one `Engine`."""

import asyncio
import contextlib
import importlib.resources
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from lightning_lm.errors import LightningLMError
from lightning_lm.serving.calls import Call, ModelCalls
from lightning_lm.serving.engine import Engine
from lightning_lm.serving.fields import RequestError
from lightning_lm.serving.gate import Gate
from lightning_lm.serving.request import TIMED_OUT, GenerationRequest, TimedOut, Update
from lightning_lm.serving.responses import Responses, error_body, error_status
from lightning_lm.serving.weights import allowed_folder, update_from_folder
from lightning_lm.storage.json_text import parse_json

__all__ = ["Server"]

T = TypeVar("T")

_LARGE = 64
"""Log-probabilities of an update from which on its chunk is made beside the event loop."""
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server:
    """OpenAI's interface and the chat page over an engine.

    Args:
        engine: Computes the completions; it must run while the application does.
        name: Name of the model in responses and ``/v1/models``.
        api_key: Bearer token that requests need; ``None`` for none.
        timeout_s: Longest time of a request, from its arrival. Seconds.
        max_bytes: Longest body of a request. Bytes.
        weights_root: Let clients replace the weights by those of a folder below this one, as
            `lightning_lm.generation.WeightPush` does; ``None`` for not at all.
        allowed_hosts: Names under which the page may be reached, besides addresses and ``localhost``: those of a
            reverse proxy.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_bytes: int = 4 << 20,
        weights_root: str | Path | None = None,
        allowed_hosts: Collection[str] = (),
    ) -> None:
        self._engine, self._api_key = engine, api_key
        self._calls = ModelCalls(engine.model, engine.tokenizer, name)
        self._timeout_s, self._max_bytes = timeout_s, max_bytes
        self._created = int(time.time())
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        self._weights_root, self._updating = weights_root, asyncio.Lock()
        if weights_root is not None:
            routes.append(Route("/update_weights_from_disk", self._update_weights, methods=["POST"]))
        handlers: Any = {HTTPException: _http_error, LightningLMError: _error, Exception: _unexpected}
        self.app: ASGIApp = Gate(Starlette(routes=routes, exception_handlers=handlers), api_key, allowed_hosts)
        """The ASGI application."""

    async def _page(self, _: Request) -> Response:
        page = importlib.resources.files("lightning_lm.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"})

    async def _health(self, _: Request) -> Response:
        engine = self._engine
        state = {
            "status": "ok" if engine.is_alive else "stopped",
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "continuous_batching": engine.is_continuous,
        }
        return JSONResponse(state, status_code=200 if engine.is_alive else 503)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._calls.name:
            raise RequestError(
                f"The model {name!r:.80} is not served here; this server has {self._calls.name!r}.",
                status=404,
                code="model_not_found",
            )
        return JSONResponse(self._description)

    @property
    def _description(self) -> dict[str, Any]:
        return {
            "id": self._calls.name,
            "object": "model",
            "created": self._created,
            "owned_by": "lightning-lm",
            "max_model_len": self._calls.context_length,
            "has_chat_template": self._calls.has_chat_template,
        }

    async def _chat(self, request: Request) -> Response:
        return await self._respond(request, self._calls.chat)

    async def _completions(self, request: Request) -> Response:
        return await self._respond(request, self._calls.completion)

    async def _respond(self, request: Request, read: Callable[[Any], Call]) -> Response:
        deadline_s = time.monotonic() + self._timeout_s
        body = await _until(deadline_s, _json_body(request, self._max_bytes))
        call = await run_in_threadpool(read, body)
        work = _Work(self._engine, call, deadline_s)
        responses = Responses(call, self._engine.tokenizer, self._calls.name)
        try:
            if call.stream:
                first = await _unless_disconnected(request, work.next())
                if first is not None:
                    return StreamingResponse(
                        _stream(work, responses, call, first),
                        media_type="text/event-stream",
                        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                    )
            else:
                updates = await _unless_disconnected(request, work.all())
                if updates is not None:
                    return await run_in_threadpool(lambda: JSONResponse(responses.whole(updates)))
        except (LightningLMError, asyncio.CancelledError):
            work.cancel()
            raise
        work.cancel()
        return Response(status_code=499)

    async def _update_weights(self, request: Request) -> Response:
        body = await _json_body(request, self._max_bytes)
        given = body.get("model_path") if isinstance(body, dict) else None
        if not isinstance(given, str) or not given:
            raise RequestError("model_path must be the folder of the new weights.", param="model_path")
        assert self._weights_root is not None
        folder = allowed_folder(given, self._weights_root)
        withdrawn = threading.Event()
        try:
            async with self._updating:  # or the weights of several clients were in memory at once
                update = asyncio.ensure_future(run_in_threadpool(update_from_folder, self._engine, folder, withdrawn))
                try:
                    done = await _unless_disconnected(request, asyncio.shield(update))
                finally:
                    withdrawn.set()
                    self._engine.wake()
                    await asyncio.wait([update])
        except (LightningLMError, OSError) as error:
            return JSONResponse({"success": False, "message": str(error)}, status_code=400)
        return JSONResponse({"success": done is not None, "message": f"The weights are those in {folder}."})


class _Work:
    """The requests of a call under way, and their updates as they come."""

    def __init__(self, engine: Engine, call: Call, deadline_s: float) -> None:
        self._engine = engine
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(index: int, update: Update) -> None:
            if not call.stream:  # nobody reads before the end, so the event loop is woken for that only
                self._updates[index].append(update)
                if not update.is_last:
                    return
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it every connection
                loop.call_soon_threadsafe(self._queue.put_nowait, (index, update))

        self._requests: list[GenerationRequest] = call.requests(deliver, deadline_s)
        self._updates: list[list[Update]] = [[] for _ in self._requests]
        self._left, self._deadline_s = len(self._requests), deadline_s
        engine.submit(*self._requests)

    async def next(self) -> tuple[int, Update]:
        """Return the index of a choice and its next update.

        Raises:
            TimedOut: If none has come in time, whatever the engine is busy with.
        """
        index, update = await _until(self._deadline_s, self._queue.get())
        if update.error is not None:
            raise update.error
        self._left -= update.is_last
        return index, update

    async def rest(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield the updates that are still to come."""
        while self._left:
            yield await self.next()

    async def all(self) -> list[list[Update]]:
        """Return all updates of each choice, for a call without streaming."""
        async for _ in self.rest():
            pass
        return self._updates

    def cancel(self) -> None:
        """Give up what is not finished."""
        self._engine.cancel(*self._requests)


async def _stream(work: _Work, responses: Responses, call: Call, first: tuple[int, Update]) -> AsyncIterator[str]:
    """Yield server-sent events; a client that goes ends the work."""
    generated = 0
    try:
        async for index, update in _behind(first, work.rest()):
            generated += len(update.token_ids)
            if len(update.prompt_logprobs) < _LARGE:
                yield _events(responses.chunks(index, update))
            else:
                yield await run_in_threadpool(lambda i=index, u=update: _events(responses.chunks(i, u)))  # type: ignore[misc]
        if call.include_usage:
            yield _events([responses.usage_chunk(generated)])
        yield "data: [DONE]\n\n"
    except LightningLMError as error:
        yield _events([error_body(str(error), error_status(error))])
    finally:
        work.cancel()


async def _behind(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for item in rest:
        yield item


def _events(contents: Iterable[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(content)}\n\n" for content in contents)


async def _until(deadline_s: float, work: Awaitable[T]) -> T:
    """Return the result of a coroutine.

    Raises:
        TimedOut: If it does not come until then, by ``time.monotonic()``.
    """
    try:
        async with asyncio.timeout(max(deadline_s - time.monotonic(), 0)):
            return await work
    except TimeoutError:
        raise TimedOut(TIMED_OUT) from None


async def _unless_disconnected(request: Request, work: Any) -> Any:
    """Return the result of a coroutine; ``None`` if the client goes before."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for pending in (task, watch):
            pending.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json_body(request: Request, max_bytes: int) -> Any:
    """Return the parsed body.

    Only JSON by its declared type is read: a browser sends that to another site only with that site's consent.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"The body has the type {kind!r:.60}; send application/json.", status=415, code=None)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise RequestError(f"The body has more than {max_bytes:,} bytes. Send less.", status=413, code=None)
        parts.append(part)
    try:
        return parse_json(b"".join(parts))
    except ValueError as error:
        raise RequestError(f"The body is not JSON: {error}.", code="invalid_json") from error


async def _error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LightningLMError)
    status = error_status(error)
    param, code = (error.param, error.code) if isinstance(error, RequestError) else (None, None)
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(error_body(str(error), status, param=param, code=code), status_code=status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(error_body(message, error.status_code), status_code=error.status_code, headers=error.headers)


async def _unexpected(_: Request, error: Exception) -> Response:
    message = f"The server failed at this request: {type(error).__name__}. See its output."
    return JSONResponse(error_body(message, 500), status_code=500)
