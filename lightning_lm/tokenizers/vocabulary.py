"""The vocabulary of byte-pair encoding: which bytes each id stands for, and whether its merges agree."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import TokenizerError

__all__ = ["Merge", "Vocabulary"]

Merge = tuple[bytes, bytes]
"""Two tokens that become one."""

_MOST_IDS = 2**24
"""Limit of ids, a hundred times those of the largest models: tables have a row for each id."""
_ADVICE = "PretrainedTokenizer reads such a file as it is."


class Vocabulary:
    """The tokens of byte-level byte-pair encoding, without special tokens.

    Args:
        merges: In the order in which they are applied.
        ids: The id of every byte and merged token; by default bytes come first, then merges.

    Raises:
        TokenizerError: If a merge uses or makes a token it cannot, or a token has no id.
    """

    def __init__(self, merges: Sequence[Merge], ids: Mapping[bytes, int] | None = None) -> None:
        self.merges = [(bytes(left), bytes(right)) for left, right in merges]
        tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in self.merges]
        self._order = {token: rank for rank, token in enumerate(tokens)}
        self._check_merges()
        self.ids = dict(self._order if ids is None else ids)
        self._check_ids()
        self.next_id = max(self.ids.values()) + 1

    @functools.cached_property
    def ranks(self) -> dict[bytes, int]:
        """A number for each token that grows in the order of the merges: the id itself wherever that does."""
        return self._order if self._renumbered else self.ids

    @functools.cached_property
    def ids_of_ranks(self) -> NDArray[np.int64] | None:
        """The id for each of the ranks, where these are not the same."""
        return np.fromiter(map(self.ids.__getitem__, self._order), dtype=np.int64) if self._renumbered else None

    def table(self, special_tokens: Mapping[str, int]) -> list[bytes]:
        """Return the bytes of each id.

        Raises:
            TokenizerError: If a special token takes the id or the text of another token.
        """
        taken = dict(zip(self.ids.values(), self.ids, strict=True))
        for name, number in special_tokens.items():
            if number in taken:
                raise TokenizerError(f"The special token {name!r} has the id {number} of the token {taken[number]!r}.")
            if not isinstance(number, int) or not 0 <= number < _MOST_IDS:
                raise TokenizerError(
                    f"The special token {name!r} has the id {number}; ids lie in 0 ... {_MOST_IDS - 1}."
                )
            if name.encode() in self.ids:
                raise TokenizerError(f"The special token {name!r} is an ordinary token too; choose another name.")
            taken[number] = name.encode()
        return [taken.get(number, b"") for number in range(max(taken) + 1)]

    @functools.cached_property
    def _renumbered(self) -> bool:
        merged = [self.ids[left + right] for left, right in self.merges]
        return any(later < earlier for earlier, later in pairwise(merged))

    def _check_ids(self) -> None:
        if missing := self._order.keys() - self.ids.keys():
            raise TokenizerError(f"{len(missing)} tokens have no id, among them {min(missing)!r}. {_ADVICE}")
        if unknown := self.ids.keys() - self._order.keys():
            raise TokenizerError(f"{len(unknown)} tokens are made by no merge, among them {min(unknown)!r}. {_ADVICE}")
        ids = set(self.ids.values())
        if len(ids) < len(self.ids) or not all(type(number) is int and 0 <= number < _MOST_IDS for number in ids):
            raise TokenizerError(f"Two tokens have the same id, or an id lies outside of 0 ... {_MOST_IDS - 1}.")

    def _check_merges(self) -> None:
        """Check that applying the merges to the bytes of a token makes that token, by its own merge.

        tiktoken merges any two neighbours whose bytes are a token. Where this check passes, that is the same as
        applying the merges in order: a substring that ends up as one token goes through the same merges wherever
        it stands, since no merge crosses its ends.
        """
        made: dict[tuple[int, int], int] = {}
        parts: list[tuple[int, int]] = []
        for rank, (left, right) in enumerate(self.merges):
            pair = (self._order.get(left, 2**31), self._order.get(right, 2**31))
            if max(pair) >= 256 + rank:
                raise TokenizerError(f"Merge {rank} uses {left!r} and {right!r}, but only later merges make these.")
            if self._order[left + right] != 256 + rank:
                raise TokenizerError(f"Two merges make the same token {left + right!r}. {_ADVICE}")
            if _is_crossed(pair, made, parts):
                raise TokenizerError(
                    f"Merge {rank}, {left!r} + {right!r}, is never reached: earlier merges cut it differently. "
                    f"{_ADVICE}"
                )
            made[pair] = 256 + rank
            parts.append(pair)


def _is_crossed(pair: tuple[int, int], made: Mapping[tuple[int, int], int], parts: Sequence[tuple[int, int]]) -> bool:
    """Tell whether an earlier merge joins the end of the left token with the beginning of the right one.

    While the left token grows together, its last part is merged away at certain moments; so is the first part of the
    right one. A merge crosses if it comes while both of its tokens are there. Where all three are equal, as in ``aaa``,
    the leftmost pair goes first.
    """
    for end, end_gone in _spine(pair[0], parts, 1):
        for begin, begin_gone in _spine(pair[1], parts, 0):
            moment = made.get((end, begin))
            if moment is not None and moment < end_gone and moment <= begin_gone:
                return True
    return False


def _spine(number: int, parts: Sequence[tuple[int, int]], side: int) -> Iterator[tuple[int, int]]:
    """Yield a token's outermost parts on one side, the largest first, each with the merge at which it goes."""
    gone = 256 + len(parts)
    while True:
        yield number, gone
        if number < 256:
            return
        gone, number = number, parts[number - 256][side]
