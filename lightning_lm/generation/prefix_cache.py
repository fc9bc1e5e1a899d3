"""Keys and values of the beginnings of prompts that were read before, such as a system prompt.

A beginning is a chain of full blocks of tokens. A block is found by its tokens and its predecessor, compared exactly,
so that no two beginnings can be taken for each other. The least recently used blocks are dropped first.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_lm.generation.slots import Block

__all__ = ["PrefixCache"]

_ROOT = 0
"""Predecessor of the first block of a chain."""


class _Entry(NamedTuple):
    number: int
    block: Block
    num_bytes: int


class PrefixCache:
    """Blocks of keys and values, found by the tokens from the start of a prompt to their end.

    Args:
        max_bytes: Most memory for keys and values. Bytes; 0 keeps nothing.
        block_size: Tokens of a block.
    """

    def __init__(self, max_bytes: int, block_size: int = 16) -> None:
        self.max_bytes, self.block_size = max_bytes, block_size
        self.num_bytes = 0
        self._numbers = itertools.count(_ROOT + 1)
        self._entries: OrderedDict[tuple[int, tuple[int, ...]], _Entry] = OrderedDict()

    def find(self, ids: Sequence[int]) -> list[Block]:
        """Return the longest known chain at the start of a prompt. Its last token is always left to be read.

        Args:
            ids: Token ids of the prompt.
        """
        blocks, parent, used = [], _ROOT, []
        for part in self._parts(ids, len(ids) - 1):
            entry = self._entries.get((parent, part))
            if entry is None:
                break
            used.append((parent, part))
            blocks.append(entry.block)
            parent = entry.number
        self._touch(used)
        return blocks

    def first_block(self, ids: Sequence[int]) -> tuple[int, ...] | None:
        """Return the first block of a prompt if it could be found in the cache, but is not yet.

        Args:
            ids: Token ids of the prompt.
        """
        part = next(iter(self._parts(ids, len(ids) - 1)), None) if self.max_bytes else None
        return None if part is None or (_ROOT, part) in self._entries else part

    def store(self, ids: Sequence[int], copy: Callable[[int, int], Block]) -> None:
        """Add the blocks of a prompt that are new.

        Args:
            ids: Token ids of the prompt, which has been read.
            copy: Returns keys and values of the tokens from one place to another.
        """
        parent, used = _ROOT, []
        for index, part in enumerate(self._parts(ids, len(ids)) if self.max_bytes else ()):
            entry = self._entries.get((parent, part))
            if entry is None:
                block = copy(index * self.block_size, (index + 1) * self.block_size)
                num_bytes = sum(x.numel() * x.element_size() for pair in block for x in pair)
                entry = self._entries[parent, part] = _Entry(next(self._numbers), block, num_bytes)
                self.num_bytes += num_bytes
            used.append((parent, part))
            parent = entry.number
        self._touch(used)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._entries.popitem(last=False)[1].num_bytes

    def clear(self) -> None:
        """Forget everything, as under new weights."""
        self._entries.clear()
        self.num_bytes = 0

    def _touch(self, used: list[tuple[int, tuple[int, ...]]]) -> None:
        """Mark blocks as used, ends before beginnings: an end without its beginning is never found."""
        for key in reversed(used):
            self._entries.move_to_end(key)

    def _parts(self, ids: Sequence[int], end: int) -> list[tuple[int, ...]]:
        size = self.block_size
        return [tuple(ids[first : first + size]) for first in range(0, end - size + 1, size)]
