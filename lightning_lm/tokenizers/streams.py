"""Long texts in pieces: files read in blocks, and streams cut where cutting changes nothing."""

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lightning_lm.errors import TokenizerError

__all__ = ["avoiding_special", "read_text", "rejoin", "special_expression"]

_CHUNK_CHARACTERS = 1 << 16
_BLOCK_BYTES = 1 << 18


def read_text(path: os.PathLike[str] | str, *, block_bytes: int = _BLOCK_BYTES) -> Iterator[str]:
    """Yield a UTF-8 file in blocks; without a byte-order mark at its start, with line ends as they are.

    Raises:
        TokenizerError: If the file is not UTF-8; the message names it.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with Path(path).open("rb") as file:
        try:
            while block := file.read(block_bytes):
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{os.fspath(path)} is not UTF-8 text ({error.reason}); convert it, for example with iconv, or leave "
                "it out."
            ) from error


def rejoin(texts: Iterable[str], last_cut: Callable[[str], int], *, size: int = _CHUNK_CHARACTERS) -> Iterator[str]:
    """Yield texts that follow each other in chunks that can be taken one by one.

    The parts may be cut anywhere, even within a word or a special token; a chunk ends only at a place that ``last_cut``
    returns. Memory is bounded by ``size`` and by the longest run of text without such a place.

    Args:
        texts: Parts of one text, in order.
        last_cut: Returns the last place at which a text that is not finished may be cut, 0 if there is none.
        size: Characters to collect before a chunk is cut off.
    """
    parts: list[str] = []
    held, wanted = 0, size
    for text in texts:
        parts.append(text)
        held += len(text)
        if held < wanted:
            continue
        joined = "".join(parts)
        cut = last_cut(joined)
        if cut:
            yield joined[:cut]
        parts, held = [joined[cut:]], len(joined) - cut
        # Looking again only after as much text again keeps the work linear where cuts are rare.
        wanted = max(size, 2 * held)
    if last := "".join(parts):
        yield last


def special_expression(special_tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return an expression that finds special tokens, the longest first where one begins another."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def avoiding_special(last_cut: Callable[[str], int], special_tokens: Iterable[str]) -> Callable[[str], int]:
    """Return a ``last_cut`` that cuts after special tokens and never within one, complete or not."""
    tokens = list(special_tokens)
    expression = special_expression(tokens)
    if expression is None:
        return last_cut
    longest = max(map(len, tokens))

    def outside_special(text: str) -> int:
        # A special token that starts before this place lies within the text as a whole, if it is one.
        decided = len(text) - longest + 1
        after = 0
        for match in expression.finditer(text):
            if match.start() >= decided:
                break
            after = match.end()
        return max(after, last_cut(text[: max(0, decided)]))

    return outside_special
