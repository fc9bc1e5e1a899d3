"""Answers of a server with OpenAI's interface, streamed by server-sent events with the standard library."""

import argparse
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.storage.json_text import parse_json

__all__ = ["ServerPartner"]

_TIMEOUT_S = 600
_SHOWN = 300


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the error that it is: the key is meant for the given address only."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none."""


class ServerPartner:
    """The model of a server. Redirects are refused, and proxies are not looked for, as in training.

    Args:
        namespace: Parsed arguments of `lightning_lm.cli.chat.add_arguments`.

    Raises:
        RemoteError: If the server cannot be reached.
    """

    def __init__(self, namespace: argparse.Namespace) -> None:
        url = namespace.server.rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ConfigurationError(f"--server {url} must begin with http:// or https://.")
        self._url = url if url.endswith("/v1") else f"{url}/v1"
        key = os.environ.get(namespace.api_key_variable, "").strip()
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._settings = {"top_p": namespace.top_p, "max_tokens": namespace.max_new_tokens, "seed": namespace.seed}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
        self._model = namespace.model or self._first_model()

    def reply(self, messages: list[dict[str, str]], temperature: float) -> Iterator[str]:
        """Yield the text of an answer while it grows; closing the iterator ends the request.

        Args:
            messages: The conversation.
            temperature: That of the sampling.

        Raises:
            RemoteError: If the server refuses or breaks off.
        """
        given = {name: value for name, value in self._settings.items() if value is not None}
        body = {"model": self._model, "messages": messages, "temperature": temperature, "stream": True, **given}
        broke_off = RemoteError(f"{self._url} broke off. See the server's output.")
        with self._open("chat/completions", json.dumps(body).encode()) as response:
            try:
                for line in response:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield self._piece(data)
            except http.client.HTTPException as error:
                raise broke_off from error
        raise broke_off

    def _piece(self, data: bytes) -> str:
        try:
            event = parse_json(data)
            if "error" in event:
                raise RemoteError(f"{self._url}: {event['error']['message']}")
            pieces = [choice["delta"].get("content") or "" for choice in event["choices"]]
            return "".join(pieces)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RemoteError(
                f"{self._url} sent what is no chunk of a chat: {data[:_SHOWN]!r}. Is it a server with OpenAI's "
                "interface?"
            ) from error

    def _first_model(self) -> str:
        with self._open("models") as response:
            try:
                text = response.read(1 << 20)
            except http.client.HTTPException as error:
                raise RemoteError(f"{self._url}/models broke off. See the server's output.") from error
        try:
            return str(parse_json(text)["data"][0]["id"])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise RemoteError(
                f"{self._url}/models lists no model: {text[:_SHOWN]!r}. Name one with --model, or correct --server."
            ) from error

    def _open(self, path: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(f"{self._url}/{path}", data, self._headers)
        try:
            return self._opener.open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if 300 <= error.code < 400:
                raise RemoteError(
                    f"{self._url} sends its clients to {error.headers.get('Location')}. If that is the server, give it "
                    "with --server.",
                    status=error.code,
                ) from error
            raise RemoteError(f"{self._url}: {_message(error)}", status=error.code) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or repr(error)
            raise RemoteError(
                f"{self._url} cannot be reached: {reason}. Start it with lightning-lm serve, or correct --server."
            ) from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(1 << 16)
    except (OSError, http.client.HTTPException):
        return f"status {error.code}"
    try:
        return str(parse_json(text)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return f"status {error.code}: {text[:_SHOWN].decode(errors='replace')}"
