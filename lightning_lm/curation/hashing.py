"""64-bit hashes of texts by xxHash, the same in every process."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import MissingDependencyError

__all__ = ["hash_bytes", "hash_text", "hash_texts"]


def hash_bytes(values: Iterable[bytes]) -> NDArray[np.uint64]:
    """Return the hash of each value, uint64 [values].

    Args:
        values: Bytes.

    Raises:
        MissingDependencyError: If ``xxhash`` is not installed.
    """
    try:
        from xxhash import xxh3_64_intdigest
    except ModuleNotFoundError as error:
        raise MissingDependencyError("xxhash", "hash documents and lines", "curation") from error
    return np.fromiter(map(xxh3_64_intdigest, values), np.uint64)


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
