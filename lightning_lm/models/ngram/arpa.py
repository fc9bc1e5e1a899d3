r"""ARPA files, the text format of n-gram models that KenLM, SRILM and others read and write.

A section for each order has lines of log10-probability, the n-gram's words, and the log10-weight of the order below.
``<s>`` starts a document, ``</s>`` ends it, ``<unk>`` has the probability of each word that is not listed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import DataError
from lightning_lm.models.ngram.codes import find
from lightning_lm.models.ngram.model import NgramModel, Table
from lightning_lm.storage import replacing

__all__ = ["START", "UNKNOWN_WORD", "read_arpa", "write_arpa"]

START, UNKNOWN_WORD = "<s>", "<unk>"
_LN10 = math.log(10.0)
_NEVER = -99.0
"""log10 of a probability of zero, by convention."""
_LINES = 1 << 16


def write_arpa(
    model: NgramModel, path: Path | str, words: Sequence[str], *, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write a model as an ARPA file, which appears as a whole or not at all.

    Args:
        model: The model.
        path: File to write.
        words: A name for each token id, without white space; ``</s>`` for the end of a document.
        advance: Is told how many n-grams have been written.

    Raises:
        DataError: If the names are not as many as the ids, not different, or have white space in them.
    """
    if len(words) != model.vocab_size or len(set(words)) < len(words):
        raise DataError(f"An ARPA file needs a different name for each of the {model.vocab_size:,} token ids.")
    if bad := [word for word in words if not word or word.split() != [word] or word == START]:
        raise DataError(f"{bad[0]!r} cannot be a word of an ARPA file: white space divides words, and {START} begins.")
    names = [*words, START]
    unknown = UNKNOWN_WORD not in words  # then it stands for nothing that the tokenizer makes
    with replacing(Path(path)) as file:
        sizes = [len(table.codes) + (unknown and length == 0) for length, table in enumerate(model.tables)]
        head = "".join(f"ngram {order}={size}\n" for order, size in enumerate(sizes, 1))
        file.write(f"\\data\\\n{head}".encode())
        for length, table in enumerate(model.tables):
            file.write(f"\n\\{length + 1}-grams:\n".encode())
            if unknown and length == 0:
                file.write(f"{_NEVER:g}\t{UNKNOWN_WORD}\n".encode())
            for begin in range(0, len(table.codes), _LINES):
                rows = np.arange(begin, min(begin + _LINES, len(table.codes)))
                file.write(_lines(model, length, rows, names).encode())
                advance(len(rows))
        file.write(b"\n\\end\\\n")


def read_arpa(path: Path | str, words: Sequence[str] | None = None) -> tuple[NgramModel, list[str]]:
    """Return the model of an ARPA file, and the name of each token id.

    Args:
        path: The file, as text.
        words: Names of the ids; by default the words of the file, in its order.

    Raises:
        DataError: If the file is no ARPA file, is cut short, or an n-gram lacks its prefix; names the line.
    """
    with Path(path).open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        reader = _Reader(Path(path), file)
        sizes = reader.sizes()
        unigrams = list(reader.section(1, sizes[0]))
        names = [word for _, (word,), _ in unigrams if word != START] if words is None else list(words)
        ids = {word: index for index, word in enumerate([*names, START])}
        tables = [_first_table(unigrams, ids)]
        for length in range(2, len(sizes) + 1):
            tables.append(_table(reader, length, sizes[length - 1], ids, [table.codes for table in tables]))
        reader.end()
    return NgramModel(tables), names


def _lines(model: NgramModel, length: int, rows: NDArray[np.int64], names: list[str]) -> str:
    table = model.tables[length]
    parts: list[NDArray[np.int64]] = []
    prefixes = rows
    for above in reversed(model.tables[1 : length + 1]):
        prefixes, symbols = np.divmod(above.codes[prefixes], model.vocab_size + 1)
        parts.append(symbols)
    texts = [names[symbol] for symbol in prefixes]
    for symbols in reversed(parts):
        texts = [f"{text} {names[symbol]}" for text, symbol in zip(texts, symbols, strict=True)]
    logs = np.maximum(table.log_probs[rows] / _LN10, _NEVER)
    if length == model.order - 1:
        return "".join(f"{log:.9g}\t{text}\n" for log, text in zip(logs, texts, strict=True))
    weights = table.log_backoffs[rows] / _LN10
    return "".join(f"{log:.9g}\t{text}\t{weight:.9g}\n" for log, text, weight in zip(logs, texts, weights, strict=True))


class _Reader:
    """Lines of an ARPA file, with their numbers for messages."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file, self.number = path, file, 0

    def sizes(self) -> list[int]:
        """Return the number of n-grams of each order, from the head of the file."""
        if not any(line == "\\data\\" for line in self._lines()):
            raise self.error("there is no line \\data\\")
        sizes: list[int] = []
        for line in self._lines():
            if not line:
                if sizes:
                    return sizes
                continue
            name, _, size = line.removeprefix("ngram ").partition("=")
            if name.strip() != str(len(sizes) + 1) or not size.strip().isdecimal():
                raise self.error(f"{line[:60]!r} is not 'ngram {len(sizes) + 1}=...'")
            sizes.append(int(size))
        raise self.error("it ends in its head")

    def section(self, length: int, size: int) -> Iterator[tuple[float, list[str], float]]:
        """Yield log-probability, words and log-weight of each n-gram. Nats."""
        header = next((line for line in self._lines() if line), "")
        if header != f"\\{length}-grams:":
            raise self.error(f"{header[:60]!r} is not '\\{length}-grams:'")
        count = 0
        for line in self._lines():
            if not line:
                break
            yield self._entry(line, length)
            count += 1
            if count == size:
                break
        if count != size:
            raise self.error(f"the section has {count:,} {length}-grams and its head states {size:,}")

    def end(self) -> None:
        """Check that the file is complete."""
        last = next((line for line in self._lines() if line), "")
        if last != "\\end\\":
            raise self.error(f"{last[:60]!r} is not '\\end\\'")

    def error(self, what: str) -> DataError:
        """Return an error that names the line."""
        return DataError(f"{self._path} line {self.number:,} is no ARPA file: {what}. Write or copy it again.")

    def _entry(self, line: str, length: int) -> tuple[float, list[str], float]:
        fields = line.split()
        try:
            log, weight = float(fields[0]), float(fields[length + 1]) if len(fields) > length + 1 else 0.0
        except (ValueError, IndexError):
            raise self.error(f"{line[:60]!r} is no {length}-gram") from None
        if not length < len(fields) <= length + 2 or not log <= 0.0 or math.isnan(weight):
            raise self.error(f"{line[:60]!r} is no {length}-gram with a log-probability")
        return log * _LN10 if log > _NEVER else -math.inf, fields[1 : length + 1], weight * _LN10

    def _lines(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            yield line.strip()


def _first_table(unigrams: list[tuple[float, list[str], float]], ids: dict[str, int]) -> Table:
    unseen = next((log for log, (word,), _ in unigrams if word == UNKNOWN_WORD), -math.inf)
    log_probs, weights = np.full(len(ids), unseen), np.zeros(len(ids))
    log_probs[-1] = -math.inf
    for log, (word,), weight in unigrams:
        if word in ids:
            weights[ids[word]] = weight
            if word != START:
                log_probs[ids[word]] = log
    return Table(np.arange(len(ids)), log_probs, weights)


def _table(reader: _Reader, length: int, size: int, ids: dict[str, int], below: list[NDArray[np.int64]]) -> Table:
    symbols, values = np.empty((size, length), np.int64), np.empty((size, 2))
    for row, (log, words, weight) in enumerate(reader.section(length, size)):
        try:
            symbols[row] = [ids[word] for word in words]
        except KeyError as error:
            raise reader.error(f"{error.args[0]!r} is none of its words, or of the vocabulary") from None
        values[row] = log, weight
    prefixes = symbols[:, 0]
    for codes, column in zip(below[1:], symbols.T[1:-1], strict=True):
        prefixes = find(codes, np.where(prefixes < 0, -1, prefixes * len(ids) + column))
    if (prefixes < 0).any():
        raise reader.error(f"a {length}-gram has a prefix that is not listed (n-gram {int(prefixes.argmin()) + 1:,})")
    codes = prefixes * len(ids) + symbols[:, -1]
    order = np.argsort(codes)
    if (np.diff(codes[order]) == 0).any():
        raise reader.error(f"a {length}-gram is listed twice")
    return Table(codes[order], values[order, 0].copy(), values[order, 1].copy())
