"""The program of one word-counting process: texts come in, words are counted, the counts go out at the end.

It is run as a file by a fresh interpreter, so it imports nothing of this package and starts in a few milliseconds. (A
forked process could inherit another thread's locks, and a spawned one would run the user's script a second time.)

Its argument is the list of arguments of `WordCounter` as JSON. It reads pickled lists of texts, answers each by one
byte, and writes the pickled counts when ``None`` comes.
"""

import contextlib
import json
import pickle
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["WordCounter"]


class WordCounter:
    """Counts the words of texts; special tokens split the text and are not counted.

    Args:
        expression: The split pattern, in the syntax of ``regex``.
        ascii_expression: The same for ASCII text in the syntax of ``re``, or "".
        special_tokens: Strings that are no part of any word.
    """

    def __init__(self, expression: str, ascii_expression: str, special_tokens: Sequence[str]) -> None:
        import regex

        self.counts: Counter[str] = Counter()
        self._split = regex.compile(expression).findall
        self._split_ascii = re.compile(ascii_expression, re.ASCII).findall if ascii_expression else self._split
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def add(self, texts: Iterable[str]) -> None:
        """Count the words of more texts."""
        for text in texts:
            for part in self._special.split(text) if self._special else (text,):
                self.counts.update(self._split_ascii(part) if part.isascii() else self._split(part))


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    receive, send = sys.stdin.buffer, sys.stdout.buffer
    counter = WordCounter(*json.loads(sys.argv[1]))
    while (texts := pickle.load(receive)) is not None:
        counter.add(texts)
        send.write(b".")
        send.flush()
    pickle.dump(dict(counter.counts), send, protocol=pickle.HIGHEST_PROTOCOL)


if __name__ == "__main__":
    # The input ends early only when the parent is gone.
    with contextlib.suppress(EOFError):
        _main()
