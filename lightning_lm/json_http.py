"""JSON over HTTP with the standard library, for inference servers and judges."""

import contextlib
import dataclasses
import http.client
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.parts import Limit, Part
from lightning_lm.storage.json_text import parse_json

__all__ = ["JSONServer"]

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes of trouble that may be over soon."""

_LONGEST_PAUSE_S = 60.0
_SHOWN = 500
"""Characters of a response that an error message quotes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JSONServer(
    Part,
    limits={
        "timeout_s": Limit.POSITIVE,
        "retries": Limit.NON_NEGATIVE,
        "backoff_s": Limit.NON_NEGATIVE,
        "max_bytes": Limit.COUNT,
    },
):
    """A server that takes and returns JSON; safe to use from many threads.

    Trouble that may pass (status 408, 425, 429, 500, 502, 503, 504, a connection that fails) is tried again after a
    pause that doubles each time, or that the server's ``Retry-After`` names. A server that is merely busy (429 with
    ``Retry-After``) is asked again until ``timeout_s`` has passed. A request that runs out of time is not sent again:
    the server may still work on it, and would get it twice. Redirects are refused, and proxies are not looked for.

    Args:
        url: Address of the API, such as ``http://localhost:8000/v1``.
        api_key_variable: Environment variable with the key, sent as a bearer token. Only its name is kept here,
            so that no key gets into a checkpoint or a log.
        timeout_s: Longest time for one attempt, from connecting to the last byte, and for which a busy server is asked
            again. Seconds.
        retries: Further attempts after the first.
        backoff_s: Pause before the second attempt, seconds. Each is drawn between half of it and all of it, so that
            many clients do not come back at once.
        max_bytes: Longest response that is read. Bytes.

    Raises:
        ConfigurationError: If the address is not one, or a number is out of range.
    """

    url: str = dataclasses.field(kw_only=False)
    api_key_variable: str | None = None
    timeout_s: float = 600.0
    retries: int = 4
    backoff_s: float = 0.5
    max_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        _split(self.url)
        super().__post_init__()

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send an object and return the object in the response.

        Args:
            path: Below the address, such as ``completions``.
            body: Body of the request.

        Raises:
            RemoteError: If the server is unreachable, refuses, times out, or does not return a JSON object.
            ConfigurationError: If the environment does not hold the key, or the key cannot be in a header.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self._authorization()}
        data = json.dumps(body).encode()
        attempt, patience_ends_s = 0, time.monotonic() + self.timeout_s
        while True:
            try:
                return self._attempt(path, data, headers)
            except _PassingError as passing:
                trouble = passing
            pause_s = self._pause(attempt, trouble.retry_after_s)
            is_busy = trouble.status == 429 and trouble.retry_after_s is not None
            if not (is_busy and time.monotonic() + pause_s < patience_ends_s):
                if attempt == self.retries:
                    break
                attempt += 1
            time.sleep(pause_s)
        tries = f" ({self.retries + 1} attempts)" if self.retries else ""
        remedy = " Start the server, or correct its url." if trouble.status is None else ""
        raise RemoteError(f"{trouble}{tries}.{remedy}", status=trouble.status)

    def _attempt(self, path: str, data: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        parts = _split(self.url)
        place = f"{self.url.rstrip('/')}/{path}"
        connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = connect(parts.hostname or "", parts.port, timeout=self.timeout_s)
        with contextlib.closing(connection), _Deadline(self.timeout_s) as deadline:
            try:
                connection.connect()
                deadline.watch(connection.sock)
                connection.request("POST", f"{parts.path.rstrip('/')}/{path}", data, dict(headers))
                response = connection.getresponse()
                content = response.read(self.max_bytes + 1)
                if response.length and len(content) <= self.max_bytes:  # `read(n)` does not report that some is missing
                    raise http.client.IncompleteRead(content, response.length)
                if deadline.passed:  # a response without a length looks complete when it is cut
                    raise TimeoutError
            except (OSError, http.client.HTTPException) as error:
                if deadline.passed or isinstance(error, TimeoutError):
                    raise RemoteError(
                        f"{place} sent no complete response within timeout_s={self.timeout_s:g}. Give it more time, "
                        "ask for less, or see whether the server hangs."
                    ) from error
                raise _PassingError(f"{place} cannot be reached: {type(error).__name__}: {error}") from error
            if len(content) > self.max_bytes:
                raise RemoteError(
                    f"{place} sent more than max_bytes={self.max_bytes:,} bytes. Ask for less, or raise max_bytes.",
                    status=response.status,
                )
            return _answer(place, response, content)

    def _authorization(self) -> dict[str, str]:
        if self.api_key_variable is None:
            return {}
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            raise ConfigurationError(
                f"The environment variable {self.api_key_variable} must hold the key for {self.url}, in plain ASCII; "
                f"it {'holds other characters' if key else 'is not set'}."
            )
        return {"Authorization": f"Bearer {key}"}

    def _pause(self, attempt: int, retry_after_s: float | None) -> float:
        # Drawn from the system's noise: the random numbers of the training run must not depend on the network.
        spread = 0.5 + secrets.randbelow(1001) / 2000
        pause = self.backoff_s * 2.0**attempt * spread
        return min(max(pause, retry_after_s or 0.0), _LONGEST_PAUSE_S)


class _PassingError(Exception):
    """Trouble that may be over soon."""

    def __init__(self, message: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


class _Deadline:
    """Cuts a connection at the deadline: a socket's own timeout is reset by every byte that arrives."""

    def __init__(self, timeout_s: float) -> None:
        self.passed = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(timeout_s, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        self._socket = connected

    def _cut(self) -> None:
        self.passed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _answer(place: str, response: http.client.HTTPResponse, content: bytes) -> dict[str, Any]:
    text = content.decode("utf-8", errors="replace")
    said = " ".join(text.split())[:_SHOWN] or response.reason
    if response.status in _PASSING:
        seconds = response.getheader("Retry-After") or ""
        retry_after_s = float(seconds) if seconds.isdecimal() else None
        raise _PassingError(
            f"{place} answered {response.status}: {said}", status=response.status, retry_after_s=retry_after_s
        )
    if response.status != 200:
        raise RemoteError(f"{place} answered {response.status}: {said}{_hint(response)}", status=response.status)
    try:
        answer = parse_json(text)
    except ValueError as error:
        raise RemoteError(f"{place} sent a response that is not JSON ({error}): {said}", status=200) from error
    if not isinstance(answer, dict):
        raise RemoteError(f"{place} must return a JSON object, and returned {said}", status=200)
    return answer


def _hint(response: http.client.HTTPResponse) -> str:
    if response.status in (401, 403):
        return " Set api_key_variable to the environment variable with the key."
    if response.status in (404, 405):
        return " The url should end where the API begins, often in /v1, and the server must know the model."
    if 300 <= response.status < 400:
        return f" Give the address it points to as url: {response.getheader('Location')}."
    return ""


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or parts.username is not None:
        raise ConfigurationError(
            f"url={url!r} must be the address of an API, such as http://localhost:8000/v1, without a key in it."
        )
    return parts
