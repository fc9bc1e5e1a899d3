"""Holding out documents for validation by what they say, so that the split needs no list and never moves."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Literal

from lightning_lm.data.sources import Source
from lightning_lm.errors import ConfigurationError, DataError

__all__ = ["Split", "hold_out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split(Source):
    """One side of a source that is split by document.

    The side follows from a hash of the document alone: copies of a text stay on one side, and documents added later
    move none of the others. A source of one document is cut in two at a line break instead.

    Args:
        source: What is split.
        side: ``"train"`` or ``"validation"``.
        fraction: The share of documents held out for validation, between 0 and 1.
    """

    source: Source
    side: Literal["train", "validation"]
    fraction: float

    def documents(self) -> Iterator[str]:
        """Yield the documents of this side, in the order of the source.

        Raises:
            DataError: If the source is empty, or too small to be split.
        """
        if self._is_small:
            yield from _split_few(list(self.source.documents()), self.fraction)[self.side == "validation"]
            return
        wanted = self.side == "validation"
        yield from (text for text in self.source.documents() if _is_held_out(text, self.fraction) is wanted)

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

    @functools.cached_property
    def _is_small(self) -> bool:
        """Whether hashing leaves a side empty. Reads only until both sides have been seen."""
        sides = set()
        for text in self.source.documents():
            sides.add(_is_held_out(text, self.fraction))
            if len(sides) == 2:
                return False
        return True


def hold_out(source: Source, fraction: float) -> tuple[Split, Split]:
    """Return the train and the validation side of a source.

    Args:
        source: What is split.
        fraction: The share of its documents held out for validation.

    Raises:
        ConfigurationError: If the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ConfigurationError(f"The share held out for validation must lie between 0 and 1, got {fraction}.")
    return (
        Split(source=source, side="train", fraction=fraction),
        Split(source=source, side="validation", fraction=fraction),
    )


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"hold-out")
    return int.from_bytes(digest.digest(), "little")


def _is_held_out(text: str, fraction: float) -> bool:
    return _hash(text) < fraction * 2.0**64


def _split_few(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split a source so small that hashing put everything on one side."""
    if not texts:
        raise DataError("The corpus is empty: it holds no document with any text. Check the path and the separator.")
    if len(set(texts)) > 1:
        held_out = min(texts, key=_hash)
        return [text for text in texts if text != held_out], [text for text in texts if text == held_out]
    text = texts[0]
    target = min(len(text) - 1, round(len(text) * (1 - fraction)))
    cut = text.rfind("\n", 0, target) + 1 or target
    if cut < 1:
        raise DataError(
            f"The corpus is one document of {len(text)} character(s), too short to hold part of it out for validation. "
            "Add text, pass a validation source, or turn validation off with validation=0."
        )
    return [text[:cut]], [text[cut:]]
