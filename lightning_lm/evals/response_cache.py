"""Responses of servers and judges in a file, so that nothing is asked, or paid for, twice."""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from lightning_lm.storage.json_text import parse_json

__all__ = ["ResponseCache", "request_key"]


def request_key(*parts: Any) -> str:
    """Return the SHA-256 of all that decides a response.

    Args:
        parts: JSON data: address, model, body.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class ResponseCache:
    """A file of JSON lines that is only appended to; safe to use from many threads.

    A line that a kill has cut is passed over, and its request is made again.

    Args:
        path: The file; made with its folders at the first response.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}
        self._is_cut = False
        self._read()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Any:
        """Return the response to a request, or ``None`` if it is not known.

        Args:
            key: Result of `request_key`.
        """
        with self._lock:
            return self._known.get(key)

    def put(self, key: str, response: Any) -> None:
        """Write a response, to the disk.

        Args:
            key: Result of `request_key`.
            response: JSON data.
        """
        line = json.dumps({"request": key, "response": response}).encode() + b"\n"
        with self._lock:
            self._known[key] = response
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"\n" + line if self._is_cut else line)
                file.flush()
                os.fsync(file.fileno())
            self._is_cut = False

    def _read(self) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        self._is_cut = bool(content) and not content.endswith(b"\n")
        for line in content.split(b"\n"):
            try:
                entry = parse_json(line)
                self._known[entry["request"]] = entry["response"]
            except (ValueError, KeyError, TypeError):  # cut by a kill
                continue
