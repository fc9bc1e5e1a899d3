"""Bloom filter (Bloom 1970): a set of texts in a few bits each, which may take a new text for a known one.

A filter of one corpus, written to a file, tells which texts of a later corpus are known. Within one corpus the outcome
would depend on the order of its documents; `ExactDuplicates` does that exactly.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from lightning_lm.curation.document import Document, Removed
from lightning_lm.errors import DataError, MissingDependencyError
from lightning_lm.parts import Limit, Part, check_numbers
from lightning_lm.storage import replacing

__all__ = ["BloomFilter", "KnownTexts"]

_MAGIC = b"lightning-lm Bloom filter 1\n"


class BloomFilter:
    """Set of texts that is sized in advance.

    Args:
        num_items: Number of texts that it is made for.
        error_rate: Fraction of new texts that it takes for known ones once it has that many.

    Raises:
        ConfigurationError: If a number is out of range.
        MissingDependencyError: If ``rbloom`` or ``xxhash`` is not installed.

    Example:
        >>> known = BloomFilter(1000, 0.001)
        >>> known.add_new(["a text", "another", "a text"])
        [True, True, False]
        >>> "a text" in known, "a third text" in known
        (True, False)
    """

    def __init__(self, num_items: int, error_rate: float = 1e-4) -> None:
        check_numbers({"num_items": Limit.COUNT, "error_rate": Limit.POSITIVE}, locals())
        check_numbers({"error_rate": Limit.BELOW_ONE}, locals())
        self._bits: Any = _library().Bloom(num_items, error_rate, _digest)

    def __contains__(self, text: str) -> bool:
        return text in self._bits

    def add(self, texts: Iterable[str]) -> None:
        """Add texts.

        Args:
            texts: The texts.
        """
        self._bits.update(texts)

    def add_new(self, texts: Iterable[str]) -> list[bool]:
        """Add texts one after the other, and return for each whether it was new.

        Args:
            texts: The texts; one that is given twice is new once.
        """
        new = []
        for text in texts:
            new.append(text not in self._bits)
            self._bits.add(text)
        return new

    def save(self, path: str | Path) -> None:
        """Write the filter to a file, replacing it as a whole.

        Args:
            path: The file.
        """
        with replacing(Path(path)) as file:
            file.write(_MAGIC + self._bits.save_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a filter from a file.

        Args:
            path: The file.

        Raises:
            DataError: If it is no filter.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"The Bloom filter {path} cannot be read: {error}.") from error
        if not data.startswith(_MAGIC) or len(data) < len(_MAGIC) + 9:  # the library needs a number and a byte
            raise DataError(f"{path} is no Bloom filter. Write one with BloomFilter.save.")
        loaded = cls.__new__(cls)
        loaded._bits = _library().Bloom.load_bytes(data[len(_MAGIC) :], _digest)
        return loaded


def _library() -> Any:
    try:
        import rbloom
    except ModuleNotFoundError as error:
        raise MissingDependencyError("rbloom", "use a Bloom filter", "curation") from error
    return rbloom


def _digest(text: str) -> int:
    """Return a signed hash of 128 bits, the same in every process."""
    try:
        from xxhash import xxh3_128_intdigest
    except ModuleNotFoundError as error:
        raise MissingDependencyError("xxhash", "use a Bloom filter", "curation") from error
    return xxh3_128_intdigest(text.encode("utf-8", "surrogatepass")) - (1 << 127)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownTexts(Part):
    """Removes documents whose text a Bloom filter knows, such as one of an earlier crawl.

    Args:
        path: File that `BloomFilter.save` wrote.
    """

    path: str = dataclasses.field(kw_only=False)

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document, or its removal.

        Args:
            document: The document.
        """
        return Removed(document, "known_text") if document.text in _filter(self.path) else document


@functools.lru_cache(maxsize=4)
def _filter(path: str) -> BloomFilter:
    return BloomFilter.load(path)
