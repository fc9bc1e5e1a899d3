"""Text out of bytes: UTF-8, UTF-16 and UTF-32 by their mark, any other encoding only when it is named."""

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_lm.data.unpacking import read_blocks
from lightning_lm.errors import ConfigurationError, DataError

__all__ = [
    "UndecodableError",
    "bom_encoding",
    "check_encoding",
    "decoded",
    "guess_encoding",
    "is_wide_encoding",
    "split",
    "wide_encoding",
]

_LONGEST = 1 << 31
"""Characters of a document beyond which a missing separator is more likely than a document."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LIKE_UTF8 = ("iso2022", "hz", "utf-7", "utf-16", "utf-32", "cp037", "cp273", "cp424", "cp500", "cp1026", "cp1140")
"""Encodings whose files may be valid UTF-8 and mean something else."""


class UndecodableError(DataError):
    """A text file in an encoding that nobody named.

    Args:
        message: Received value, and the remedy.
        guess: The encoding that it may have.
    """

    def __init__(self, message: str, guess: str) -> None:
        super().__init__(message)
        self.guess = guess


def bom_encoding(start: bytes) -> str | None:
    """Return ``"utf-16"`` or ``"utf-32"`` for text that begins with their byte-order mark, else None."""
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)


def check_encoding(encoding: str | None) -> None:
    """Raise if an encoding does not exist.

    Args:
        encoding: Its name, or None.

    Raises:
        ConfigurationError: If Python has no codec for text of that name.
    """
    try:
        if encoding is not None:
            "".encode(encoding)
    except LookupError as error:
        raise ConfigurationError(f"encoding={encoding!r} is no text encoding; use one such as 'cp1252'.") from error


def is_wide_encoding(encoding: str | None) -> bool:
    """Tell whether every character of an encoding has two bytes or more, so that its text looks like binary data."""
    return encoding is not None and codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def decoded(path: Path, encoding: str | None = None) -> Iterator[str]:
    """Yield the text of a file in blocks.

    Args:
        path: Compressed or not.
        encoding: Encoding of a file that has no byte-order mark and is not UTF-8; ``None`` refuses such a file.

    Raises:
        UndecodableError: If the file is in another encoding; guesses which.
        DataError: If the file cannot be read.
    """
    decoder, position = None, 0
    for block in read_blocks(path):
        if decoder is None:
            name = bom_encoding(block) or _encoding_without_mark(path, block, encoding)
            decoder = codecs.getincrementaldecoder(name)()
        yield _decode(decoder, block, path, position)
        position += len(block)
    if decoder is not None:
        yield _decode(decoder, b"", path, position, final=True)


def _encoding_without_mark(path: Path, start: bytes, encoding: str | None) -> str:
    if encoding is not None:
        name = codecs.lookup(encoding).name
        return name if name.startswith(_LIKE_UTF8) or not _is_utf8(path) else "utf-8-sig"
    if (wide := wide_encoding(start[: 1 << 16])) is not None:
        raise _undecodable(path, f"it is {wide} without a byte-order mark", wide)
    return "utf-8-sig"


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in read_blocks(path):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, position: int, final: bool = False) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeError as error:
        near = f"near byte {position + getattr(error, 'start', 0)}: {getattr(error, 'reason', error)}"
        raise _undecodable(path, near, guess_encoding(block)) from error


def _undecodable(path: Path, reason: str, guess: str) -> UndecodableError:
    advice = f"It may be {guess}; if so, pass encoding={guess!r} (--data.train Files --data.train.path {path} "
    advice += f"--data.train.encoding {guess}), or convert it: iconv -f {guess} -t utf-8."
    if is_wide_encoding(guess):
        advice += f" An array of token ids is named as one: --data.train TokenFiles --data.train.path {path}."
    if guess == "utf-8":
        advice = "Most of it is UTF-8, so some bytes are damaged: fetch the file again, or write it again without them."
    return UndecodableError(f"{path} is not UTF-8 text ({reason}). {advice}", guess)


def guess_encoding(data: bytes) -> str:
    """Return the encoding that text which is not UTF-8 most likely has; ``"utf-8"`` if only a few bytes are damaged.

    Args:
        data: Some of the text.
    """
    if (wide := wide_encoding(data)) is not None:
        return wide
    high = Counter(byte for byte in data if byte >= 0x80)
    total = max(1, sum(high.values()))
    if len(data.decode("utf-8", "ignore").encode()) >= len(data) - total // 10 - 1 and total > 1:
        return "utf-8"
    if total * 3 < len(data) or len(data) < 8:
        return "cp1252" if any(0x80 <= byte < 0xA0 for byte in high) else "latin-1"
    share = {
        "shift_jis": sum(high[byte] for byte in (0x82, 0x83)) * 4,
        "euc_jp": sum(high[byte] for byte in (0xA4, 0xA5)) * 4,
        "cp1251": sum(count for byte, count in high.items() if byte >= 0xE0) * 1.4,
        "koi8-r": sum(count for byte, count in high.items() if 0xC0 <= byte < 0xE0) * 1.4,
        "gb18030": float(total) * 0.9,
    }
    return max(share, key=lambda name: share[name])


def wide_encoding(data: bytes) -> str | None:
    """Return the encoding of text without a mark in which most characters have zero bytes."""
    zeros = [data[place::4].count(0) * 4 / max(1, len(data)) for place in range(4)]
    likely = {
        "utf-32-le": min(zeros[1:]) - zeros[0],
        "utf-32-be": min(zeros[:3]) - zeros[3],
        "utf-16-le": min(zeros[1], zeros[3]) - max(zeros[0], zeros[2]),
        "utf-16-be": min(zeros[0], zeros[2]) - max(zeros[1], zeros[3]),
    }
    best = max(likely, key=lambda name: likely[name])
    if likely[best] <= 0.5:
        return None
    text = data.decode(best, "ignore")
    controls = sum(character < " " and character not in "\t\n\r\f" for character in text)
    return best if 20 * controls <= len(text) else None


def split(texts: Iterable[str], separator: str | None, path: Path) -> Iterator[str]:
    """Split a text that comes in blocks, the separator possibly cut by a block's end.

    Args:
        texts: Parts of one text, in order.
        separator: Text between documents; ``None`` joins everything.
        path: The file, for the message.

    Raises:
        DataError: If a document is longer than two billion characters.
    """
    parts: list[str] = []
    length, tail = 0, ""
    for text in texts:
        *pieces, rest = (tail + text).split(separator) if separator else [text]
        for piece in pieces:
            yield "".join([*parts, piece])
            parts, length = [], 0
        keep = len(rest) - min(len(rest), len(separator or "x") - 1)
        parts.append(rest[:keep])
        tail = rest[keep:]
        length += keep
        if length > _LONGEST:
            raise DataError(
                f"{path} has more than {_LONGEST} characters without the separator {separator!r}, too long "
                "for one document. Name the separator of its documents: Files(path=..., separator=...)."
            )
    yield "".join([*parts, tail])
