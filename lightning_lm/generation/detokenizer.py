"""From the ids of a completion to its text while it grows: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from lightning_lm.protocols import Tokenizer

__all__ = ["AnswerText"]

_REPLACEMENT = "�"
_LONGEST_UNFINISHED = 3
"""Bytes of a UTF-8 character that may have come without its last; some decoders show each as U+FFFD."""

_CONTEXT_IDS = 8
"""Ids of the prompt that are decoded with the completion: a tokenizer may drop a space at the start of a text."""


class AnswerText:
    """The text of one completion: push ids, take the text that no later id can change.

    Args:
        tokenizer: Decodes the ids.
        prompt_ids: Ids of the prompt.
        stop_strings: The text ends before the one that is completed first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        self._decoder = _Decoder(tokenizer, prompt_ids)
        self._stops = _StopStrings(stop_strings)
        self._pieces: list[str] = []
        self._taken = 0

    @property
    def stopped(self) -> bool:
        """True if a stop string came."""
        return self._stops.found

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._pieces)

    def push(self, ids: Sequence[int]) -> None:
        """Add further ids to the completion."""
        self._pieces.append(self._stops.push(self._decoder.push(ids)))

    def finish(self) -> None:
        """Return the text that was held back, once no more ids come; bytes of an incomplete character become U+FFFD."""
        self._pieces.append(self._stops.push(self._decoder.finish()) + self._stops.finish())

    def take(self) -> str:
        """Return the text that was settled since the last time; it may be empty."""
        pieces, self._taken = self._pieces[self._taken :], len(self._pieces)
        return "".join(pieces)


class _Decoder:
    """Decodes a short window of ids at a time, so that each new id costs the same however long the completion is."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_IDS:])
        self._settled_ids = len(self._ids)
        context = tokenizer.decode(self._ids) if self._ids else ""
        self._shown = len(context) - _unfinished(context)

    def push(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        ready = max(self._shown, len(text) - _unfinished(text))
        piece = text[self._shown : ready]
        self._shown = ready
        if ready == len(text) and len(self._ids) > self._settled_ids:
            self._slide()
        return piece

    def finish(self) -> str:
        return self._tokenizer.decode(self._ids)[self._shown :]

    def _slide(self) -> None:
        """Forget the ids before the ones that came since the last time."""
        self._ids = self._ids[self._settled_ids :]
        self._settled_ids = len(self._ids)
        self._shown = len(self._tokenizer.decode(self._ids))


class _StopStrings:
    """Passes text on, but for an end that might be the begin of a stop string."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, self._stop_strings), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if self.found or not self._stop_strings:
            return "" if self.found else text
        self._held += text
        begins = ((self._held.find(stop), stop) for stop in self._stop_strings)
        ends = [(begin + len(stop), begin) for begin, stop in begins if begin >= 0]
        self.found = bool(ends)
        settled = min(ends)[1] if ends else len(self._held) - self._possible_begin()
        piece, self._held = self._held[:settled], self._held[settled:]
        return piece

    def finish(self) -> str:
        return "" if self.found else self._held

    def _possible_begin(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), self._longest - 1)
        lengths = (n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop_strings))
        return next(lengths, 0)


def _unfinished(text: str) -> int:
    """Return how many characters at the end may turn into another one when more bytes come."""
    marks = len(text) - len(text.rstrip(_REPLACEMENT))
    return min(marks, _LONGEST_UNFINISHED)
