"""A judge behind a server, in this process: it prefers by a rule, counts, and can break off or speak unclearly."""

import json
import re
import threading

from lightning_lm.errors import RemoteError
from lightning_lm.json_http import JSONServer

BLOCK = re.compile(
    r"^--- assistant(?: (?P<side>[AB]))? \((?P<mark>\w+)\) ---\n(?P<text>.*?)\n\n(?=---|===)", re.M | re.S
)


def shown(prompt):
    """Return the last answer that a prompt of the default templates shows on each side."""
    return {match["side"]: match["text"] for match in BLOCK.finditer(prompt)}


def prefer(rule):
    """Return a judge that prefers the answer of the larger value."""

    def reply(prompt):
        texts = shown(prompt)
        first, second = rule(texts["A"]), rule(texts["B"])
        return f"So it is.\nVerdict: {'A' if first > second else 'B' if second > first else 'tie'}"

    return reply


class StubJudge:
    """Replies by a function of the prompt; install it with ``install``."""

    def __init__(self, reply, *, fails_after=None):
        self.reply, self.fails_after = reply, fails_after
        self.requests = []
        self._lock = threading.Lock()

    def install(self, monkeypatch):
        monkeypatch.setattr(JSONServer, "_attempt", lambda server, path, data, headers: self.answer(path, data))
        return self

    def answer(self, path, data):
        assert path == "chat/completions"
        body = json.loads(data)
        with self._lock:
            if self.fails_after is not None and len(self.requests) >= self.fails_after:
                raise RemoteError("http://localhost cannot be reached.")
            self.requests.append(body)
        said = self.reply(body["messages"][-1]["content"] if len(body["messages"]) == 1 else body["messages"])
        if isinstance(said, Exception):
            raise said
        text, finish = said if isinstance(said, tuple) else (said, "stop")
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage}
