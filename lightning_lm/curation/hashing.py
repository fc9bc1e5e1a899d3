"""64-bit hashes of texts by xxHash, the same in every process."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import MissingDependencyError

__all__ = ["hash_bytes", "hash_text", "hash_texts"]

try:
    from xxhash import xxh3_64_intdigest as _digest
except ModuleNotFoundError:  # hashes are asked for when a step is used, not when this package is imported
    _digest = None


def hash_bytes(values: Iterable[bytes]) -> NDArray[np.uint64]:
    """Return the hash of each value, uint64 [values].

    Args:
        values: Bytes.

    Raises:
        MissingDependencyError: If ``xxhash`` is not installed.
    """
    if _digest is None:
        raise MissingDependencyError("xxhash", "hash documents and lines", "curation")
    return np.fromiter(map(_digest, values), np.uint64)


def hash_texts(texts: Iterable[str]) -> NDArray[np.uint64]:
    """Return the hash of each text, uint64 [texts].

    Args:
        texts: Texts, lone surrogates included.
    """
    return hash_bytes(text.encode("utf-8", "surrogatepass") for text in texts)


def hash_text(text: str) -> int:
    """Return the hash of a text.

    Args:
        text: Text, lone surrogates included.
    """
    return int(hash_texts([text])[0])
