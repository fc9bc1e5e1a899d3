"""Held-out documents, chosen by a hash of their content: the split needs no list and never moves."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from numpy.typing import NDArray

from lightning_lm.data.sources import Source
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Limit

__all__ = ["Split", "hold_out"]

Item = TypeVar("Item", str, NDArray[Any])
"""A document: a text or its token ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split(Source, limits={"fraction": Limit.INSIDE_ONE}):
    """One side of a source that is split by document.

    The side follows from a hash of the document alone: copies of a text stay on one side, and documents added later
    move none of the others. A source of one document is cut in two at a line break instead.

    Args:
        source: Source to split.
        side: ``"train"`` or ``"validation"``.
        fraction: Fraction of the documents held out for validation, between 0 and 1.
    """

    source: Source
    side: Literal["train", "validation"]
    fraction: float

    def documents(self) -> Iterator[str]:
        """Yield the documents of this side, in the order of the source.

        Raises:
            DataError: If the source is empty, or too small to be split.
        """
        yield from self._side_of(self.source.documents)

    def token_documents(self, eos_id: int | None) -> Iterator[NDArray[Any]] | None:
        """Return the token ids of the documents of this side, if the source has ids.

        Args:
            eos_id: The id that ends a document, which is not part of the document.

        Raises:
            DataError: If the source is empty, or too small to be split.
        """
        if self.source.token_documents(eos_id) is None:
            return None
        return self._side_of(lambda: self.source.token_documents(eos_id) or iter(()))

    @property
    def fingerprint(self) -> str | None:
        """Digest of the source's fingerprint and of the split."""
        inner = self.source.fingerprint
        return inner and hashlib.sha256(f"{inner}:{self.side}:{self.fraction!r}".encode()).hexdigest()

    @property
    def num_bytes(self) -> int | None:
        """Expected bytes of this side, if the source's are known."""
        inner = self.source.num_bytes
        return inner and round(inner * (self.fraction if self.side == "validation" else 1 - self.fraction))

    def _side_of(self, read: Callable[[], Iterator[Item]]) -> Iterator[Item]:
        wanted = self.side == "validation"
        if self._is_small(read):
            yield from _split_few(list(read()), self.fraction)[wanted]
            return
        yield from (item for item in read() if _is_held_out(item, self.fraction) is wanted)

    def _is_small(self, read: Callable[[], Iterator[Item]]) -> bool:
        """Tell whether hashing leaves a side empty. Reads only until both sides have been seen."""
        if "is_small" not in self._known:
            sides = set()
            for item in read():
                sides.add(_is_held_out(item, self.fraction))
                if len(sides) == 2:
                    break
            self._known["is_small"] = len(sides) < 2
        return self._known["is_small"]

    @functools.cached_property
    def _known(self) -> dict[str, bool]:
        return {}


def hold_out(source: Source, fraction: float) -> tuple[Split, Split]:
    """Return the train and the validation side of a source.

    Args:
        source: Source to split.
        fraction: Fraction of its documents held out for validation.

    Raises:
        ConfigurationError: If the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ConfigurationError(f"The fraction held out for validation must be between 0 and 1, got {fraction}.")
    return (
        Split(source=source, side="train", fraction=fraction),
        Split(source=source, side="validation", fraction=fraction),
    )


def _bytes_of(item: Item) -> bytes:
    return item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item.astype("<u4").tobytes()


def _hash(item: Item) -> int:
    digest = hashlib.blake2b(_bytes_of(item), digest_size=8, person=b"hold-out")
    return int.from_bytes(digest.digest(), "little")


def _is_held_out(item: Item, fraction: float) -> bool:
    return _hash(item) < fraction * 2.0**64


def _split_few(items: list[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Split a source so small that hashing put everything on one side."""
    if not items:
        raise DataError("The corpus is empty: it has no document with any text. Check the path and the separator.")
    hashes = [_hash(item) for item in items]
    if len(set(hashes)) > 1:
        least = min(hashes)
        train = [item for item, number in zip(items, hashes, strict=True) if number != least]
        return train, [item for item, number in zip(items, hashes, strict=True) if number == least]
    item = items[0]
    target = min(len(item) - 1, round(len(item) * (1 - fraction)))
    cut = (item.rfind("\n", 0, target) + 1 if isinstance(item, str) else 0) or target
    if cut < 1:
        raise DataError(
            f"The corpus is one document of {len(item)} {'character' if isinstance(item, str) else 'token'}(s), too "
            "short to hold part of it out for validation. Add text, pass a validation source, or turn validation off "
            "with validation=0."
        )
    return [item[:cut]], [item[cut:]]
