"""Learn byte-pair merges from word counts.

The idea: all distinct words lie in one array, linked to their neighbours, so that one merge is a fixed number of numpy
calls over the places where the pair stands, whatever the number of words.

A pair of tokens comes into being in exactly one merge, the one that makes the younger of the two; from then on its
count only falls. So the count it was born with is an upper bound, and nothing needs to be corrected when other merges
take places away from it: the queue counts a pair again when it comes to the top, and puts it back if it has shrunk.
"""

import heapq
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import TokenizerError

__all__ = ["learn_merges"]

_WORD_END = -1
_MERGED_AWAY = -2
_REPORT_EVERY = 64

_Ints = NDArray[np.int64]
_Places = NDArray[np.int64]


def learn_merges(
    word_counts: Mapping[bytes, int], num_merges: int, *, on_progress: Callable[[int], None] | None = None
) -> list[tuple[int, int]]:
    """Return the merges of byte-pair encoding, in order.

    Each step merges the most frequent pair of neighbouring tokens. Among equally frequent pairs the lexicographically
    greatest pair of byte strings wins. In a run like ``aaa`` both pairs count, and merging goes from left to right.

    Args:
        word_counts: Number of occurrences of each word. No merge crosses a word's end.
        num_merges: Number of merges wanted; there are fewer if every word becomes a single token before.
        on_progress: Called now and then with the number of merges made so far.

    Returns:
        Pairs of token ids. Ids 0-255 are the bytes; the merge at index ``i`` makes the token ``256 + i``.

    Source:
        Sennrich et al. 2016, arXiv:1508.07909, algorithm 1.
    """
    words = _LinkedWords(word_counts)
    queue = _PairQueue()
    queue.add_all(words.initial_pairs())
    merges: list[tuple[int, int]] = []
    while len(merges) < num_merges and (pair := queue.pop(words)) is not None:
        new_id = 256 + len(merges)
        queue.name_token(pair.left, pair.right)
        queue.add_all(words.merge(pair, new_id))
        merges.append((pair.left, pair.right))
        if on_progress is not None and len(merges) % _REPORT_EVERY == 0:
            on_progress(len(merges))
    return merges


class _Pair(NamedTuple):
    left: int
    right: int
    places: _Places
    """Positions of the left token, ascending."""


class _PairGroups(NamedTuple):
    """Many pairs at once: the places of pair ``i`` are ``places[starts[i]:starts[i + 1]]``."""

    left: _Ints
    right: _Ints
    counts: _Ints
    starts: _Ints
    places: _Places


class _LinkedWords:
    """The tokens of all distinct words, as a doubly linked list in flat arrays.

    Every word is preceded and followed by a position with the id ``_WORD_END``, so neighbours always exist.
    """

    def __init__(self, word_counts: Mapping[bytes, int]) -> None:
        words = [word for word in word_counts if len(word) > 1]
        lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        counts = np.fromiter((word_counts[word] for word in words), dtype=np.int64, count=len(words))
        text = np.frombuffer(b"".join(words), dtype=np.uint8)
        size = len(text) + len(words) + 1
        if size > np.iinfo(np.int32).max:
            raise TokenizerError(
                f"The distinct words hold {len(text):,} bytes; train on a sample of the corpus instead."
            )
        inside = np.arange(1, len(text) + 1) + np.repeat(np.arange(len(words)), lengths)
        self.ids = np.full(size, _WORD_END, dtype=np.int32)
        self.ids[inside] = text
        self.weights = np.zeros(size, dtype=np.int64)
        self.weights[inside] = np.repeat(counts, lengths)
        self.next: NDArray[np.int32] = np.arange(1, size + 1, dtype=np.int32)
        self.previous: NDArray[np.int32] = np.arange(-1, size - 1, dtype=np.int32)

    def initial_pairs(self) -> _PairGroups:
        places = ((self.ids[:-1] >= 0) & (self.ids[1:] >= 0)).nonzero()[0]
        keys = self.ids[places].astype(np.int64) << 8 | self.ids[places + 1]
        order = np.argsort(keys.astype(np.uint16), kind="stable")
        firsts, counts, starts = self._groups(keys[order], places[order])
        left, right = np.divmod(firsts, 256)
        return _PairGroups(left, right, counts, starts, places[order])

    def standing(self, pair: _Pair) -> _Places:
        """Return the places at which the pair still stands."""
        places = pair.places
        there = (self.ids[places] == pair.left) & (self.ids[self.next[places]] == pair.right)
        return places if there.all() else places[there]

    def count(self, places: _Places) -> int:
        return int(self.weights[places].sum())

    def merge(self, pair: _Pair, new_id: int) -> _PairGroups:
        """Merge the pair at all its places and return the pairs that this makes."""
        left = _every_other_in_runs(pair.places, self.next) if pair.left == pair.right else pair.places
        right = self.next[left]
        after = self.next[right]
        self.ids[left] = new_id
        self.ids[right] = _MERGED_AWAY
        self.next[left] = after
        self.previous[after] = left
        return self._pairs_around(left, after, new_id)

    def _pairs_around(self, places: _Places, after: NDArray[np.int32], new_id: int) -> _PairGroups:
        before = self.previous[places]
        before_ids = self.ids[before].astype(np.int64)
        after_ids = self.ids[after].astype(np.int64)
        # Two new tokens side by side are seen from both; the left one reports them.
        has_before = (before_ids >= 0) & (before_ids != new_id)
        has_after = after_ids >= 0
        # Sorting one array of (neighbour, side, place) packed in 64 bits is several times faster than by two keys.
        keys = np.concatenate((before_ids[has_before] * 2, after_ids[has_after] * 2 + 1))
        packed = keys << 32 | np.concatenate((before[has_before], places[has_after]))
        packed.sort()

        where = packed & 0xFFFFFFFF
        firsts, counts, starts = self._groups(packed >> 32, where)
        other, on_right = firsts >> 1, (firsts & 1).astype(bool)
        return _PairGroups(np.where(on_right, new_id, other), np.where(on_right, other, new_id), counts, starts, where)

    def _groups(self, keys: _Ints, places: _Places) -> tuple[_Ints, _Ints, _Ints]:
        """Return the key, the summed weight and the start of each run of equal keys, the end of all appended."""
        if not len(keys):
            return keys, keys, np.zeros(1, dtype=np.int64)
        starts = np.concatenate(([0], (keys[1:] != keys[:-1]).nonzero()[0] + 1, [len(keys)]))
        return keys[starts[:-1]], np.add.reduceat(self.weights[places], starts[:-1]), starts


def _every_other_in_runs(places: _Places, following: NDArray[np.int32]) -> _Places:
    """Return the places at which a token can be merged with an equal one, from left to right, without overlap."""
    index = np.arange(len(places))
    starts_run = np.ones(len(places), dtype=bool)
    starts_run[1:] = following[places[:-1]] != places[1:]
    start_of_run = np.maximum.accumulate(np.where(starts_run, index, 0))
    chosen: _Places = places[(index - start_of_run) % 2 == 0]
    return chosen


class _PairQueue:
    """Pairs by the count they had when last looked at, the best first.

    Only pairs of at least ``threshold`` wait in the heap. The many rare ones stay in arrays, untouched, until the best
    pair is as rare as they are: most never are.
    """

    def __init__(self) -> None:
        self.threshold = 0
        self._heap: list[tuple[int, str, str, _Pair]] = []
        self._cold: list[tuple[int, _PairGroups]] = []
        # Heaps give the smallest first. These strings sort in the reverse order of the tokens' bytes: every byte is
        # mirrored, and a mark above all of them ends the string, so that a prefix comes after what it begins.
        self._reversed_names = [chr(255 - byte) + "\u0100" for byte in range(256)]

    def name_token(self, left: int, right: int) -> None:
        """Register the token that merging two others makes."""
        self._reversed_names.append(self._reversed_names[left][:-1] + self._reversed_names[right])

    def add_all(self, pairs: _PairGroups) -> None:
        """Add pairs that have just come into being."""
        if not len(pairs.counts):
            return
        if not self.threshold:
            self.threshold = max(1, int(pairs.counts.max()) // 2)
        self._push(pairs, (pairs.counts >= self.threshold).nonzero()[0])
        self._keep_cold(pairs)

    def pop(self, words: _LinkedWords) -> _Pair | None:
        """Take out the best pair, with the places at which it stands now."""
        while True:
            self._warm_up()
            if not self._heap:
                return None
            negative_count, *_, pair = self._heap[0]
            places = words.standing(pair)
            count = words.count(places)
            if count == -negative_count:
                heapq.heappop(self._heap)
                return pair._replace(places=places)
            if count:
                heapq.heapreplace(self._heap, self._entry(count, pair._replace(places=places)))
            else:
                heapq.heappop(self._heap)

    def _entry(self, count: int, pair: _Pair) -> tuple[int, str, str, _Pair]:
        return -count, self._reversed_names[pair.left], self._reversed_names[pair.right], pair

    def _push(self, pairs: _PairGroups, chosen: _Ints) -> None:
        for index in chosen.tolist():
            places = pairs.places[pairs.starts[index] : pairs.starts[index + 1]]
            pair = _Pair(int(pairs.left[index]), int(pairs.right[index]), places)
            heapq.heappush(self._heap, self._entry(int(pairs.counts[index]), pair))

    def _keep_cold(self, pairs: _PairGroups) -> None:
        below = pairs.counts[pairs.counts < self.threshold]
        if len(below):
            self._cold.append((int(below.max()), pairs))

    def _warm_up(self) -> None:
        """Lower the threshold until the best pair of all is in the heap."""
        while self.threshold > 1 and (not self._heap or -self._heap[0][0] < self.threshold):
            before, self.threshold = self.threshold, max(1, self.threshold // 2)
            waiting, self._cold = self._cold, []
            for most, pairs in waiting:
                if most < self.threshold:
                    self._cold.append((most, pairs))
                    continue
                self._push(pairs, ((pairs.counts >= self.threshold) & (pairs.counts < before)).nonzero()[0])
                self._keep_cold(pairs)
