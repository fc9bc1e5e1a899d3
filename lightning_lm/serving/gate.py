"""The gate of the server: holders of the API key may send requests, and of all web pages this server's own one only."""

import hmac
import ipaddress
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lightning_lm.serving.responses import error_body

__all__ = ["Gate"]


class Gate:
    """Lets requests through that have the key, and those of browsers only if they come from this server's own page.

    Args:
        app: The application behind it.
        api_key: Bearer token that requests need; ``None`` for none.
        allowed_hosts: Names under which the page may be reached, besides addresses and ``localhost``.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, allowed_hosts: Collection[str]) -> None:
        self._app, self._api_key = app, api_key
        self._allowed = frozenset(host.lower() for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by the application if it may."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self._app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and not self._is_own(origin, host, scope.get("server")):
            message = (
                f"Requests of pages from {origin[:80]} are not taken, only those of this server's own page. If this is "
                "its page behind a proxy or under another name, start the server with --allow-host NAME."
            )
            return JSONResponse(error_body(message, 403), status_code=403)
        if self._api_key is None or scope["path"] in ("/", "/health"):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
            return None
        message = "The API key is missing or wrong. Send the header Authorization: Bearer KEY."
        return JSONResponse(
            error_body(message, 401, code="invalid_api_key"), status_code=401, headers={"WWW-Authenticate": "Bearer"}
        )

    def _is_own(self, origin: str, host: str, server: Sequence[Any] | None) -> bool:
        """Return whether a page is this server's.

        A foreign page has another origin than the host that it asks. One whose name was made to resolve to this
        machine (DNS rebinding) has the same, so that at a local address names must be known; an address is no name.
        """
        try:
            page, asked = urlsplit(origin), urlsplit(f"//{host}")
            name = page.hostname
            if name is not None and name in self._allowed:
                return True
            same = page.scheme in ("http", "https") and page.netloc.lower() == asked.netloc.lower() != ""
        except ValueError:  # brackets without an address
            return False
        if not same or name is None:
            return False
        is_local = server is not None and _is_address(server[0]) and ipaddress.ip_address(server[0]).is_loopback
        return not is_local or _is_address(name) or name == "localhost" or name.endswith(".localhost")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
