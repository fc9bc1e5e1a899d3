"""Plan of the forward passes over rows that begin alike, so that a common beginning is read once.

Three levels: the trunk, which many prompts begin with (few-shot examples); the stem, which the continuations of one
prompt begin with (the question); the leaves, which are the rest of each continuation. A single token per leaf needs no
pass: it is a target of the stem's last position. The trunks are those that leave the fewest tokens to read.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_lm.evals.encoding import ScoredText

__all__ = ["Batch", "Stem", "plan_batches"]

_SHORTEST_TRUNK = 16
"""Tokens; shorter common beginnings are not looked at."""


@dataclasses.dataclass(frozen=True)
class Stem:
    """The common beginning of the rows of one prompt.

    Args:
        ids: Token ids, those of the trunk included.
        rows: Indices of the rows that begin with it.
        context: Tokens before the first target of the rows.
        has_leaves: True if a row has more than one token behind the stem.
    """

    ids: NDArray[np.uint32]
    rows: tuple[int, ...]
    context: int
    has_leaves: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """Stems that are read in one pass, on top of a trunk.

    Args:
        trunk: Tokens of each stem that are read once for all; 0 without.
        stems: The stems, the longest first.
        is_last: True if no further batch has this trunk.
    """

    trunk: int
    stems: tuple[Stem, ...]
    is_last: bool = True


def plan_batches(rows: Sequence[ScoredText], batch_size: int, *, sharing: bool, pass_cost: int) -> list[Batch]:
    """Return the passes over rows, the longest first: memory runs out early if ever.

    Args:
        rows: Rows to score.
        batch_size: Most rows of a pass.
        sharing: Read common beginnings once; ``False`` reads each row whole.
        pass_cost: Tokens that could be read in the time that a pass takes however few there are.
    """
    stems = _stems(rows, batch_size) if sharing else [_stem(rows, [index]) for index in range(len(rows))]
    grouped = _trunks(stems, pass_cost) if sharing else [(0, stems)]
    alone = [stem for trunk, group in grouped if trunk == 0 for stem in group]
    pools = [(0, [stem for stem in alone if stem.has_leaves == leaves]) for leaves in (True, False)]
    batches = []
    for trunk, group in [*pools, *(entry for entry in grouped if entry[0])]:
        chunks = list(_chunks(sorted(group, key=lambda stem: -len(stem.ids)), batch_size))
        batches += [Batch(trunk, tuple(chunk), chunk is chunks[-1]) for chunk in chunks]
    return batches


def _chunks(stems: list[Stem], batch_size: int) -> Iterator[list[Stem]]:
    chunk: list[Stem] = []
    used = 0
    for stem in stems:
        size = len(stem.rows) if stem.has_leaves else 1
        if chunk and used + size > batch_size:
            yield chunk
            chunk, used = [], 0
        chunk.append(stem)
        used += size
    if chunk:
        yield chunk


def _stems(rows: Sequence[ScoredText], batch_size: int) -> list[Stem]:
    """Return a stem for each context, several for one of more rows than a pass takes, in the order of their ids."""
    by_context: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        by_context.setdefault(row.ids[: len(row.ids) - row.num_targets].astype(">u4").tobytes(), []).append(index)
    stems = []
    for key in sorted(by_context):
        group = sorted(by_context[key], key=lambda index: -len(rows[index].ids))
        stems += [_stem(rows, group[start : start + batch_size]) for start in range(0, len(group), batch_size)]
    return stems


def _stem(rows: Sequence[ScoredText], indices: list[int]) -> Stem:
    first = rows[indices[0]]
    length = min(len(rows[index].ids) for index in indices) - 1
    for index in indices[1:]:
        length = min(length, _common(first.ids, rows[index].ids))
    return Stem(
        first.ids[:length],
        tuple(indices),
        len(first.ids) - first.num_targets,
        any(len(rows[index].ids) > length + 1 for index in indices),
    )


def _trunks(stems: list[Stem], pass_cost: int) -> list[tuple[int, list[Stem]]]:
    """Cut stems, in lexicographic order, into groups with a common trunk, so that the fewest tokens are read."""
    lengths = np.array([len(stem.ids) for stem in stems], dtype=np.int64)
    # The last token of a context belongs to the stem: its hidden state predicts the first target.
    common = [
        min(_common(left.ids, right.ids), left.context - 1, right.context - 1)
        for left, right in itertools.pairwise(stems)
    ]
    step = max(_SHORTEST_TRUNK, int(lengths.max(initial=0)) // 256)  # bounds the depth of the search
    rounded = np.array(common, dtype=np.int64) // step * step

    def best(start: int, end: int) -> tuple[int, list[tuple[int, int, int]]]:
        if end - start == 1:
            return int(lengths[start]), [(0, start, end)]
        inner = rounded[start : end - 1]
        lowest = int(inner.min())
        borders = [start, *(start + 1 + np.flatnonzero(inner == lowest)).tolist(), end]
        parts = [best(low, high) for low, high in itertools.pairwise(borders)]
        apart = sum(cost for cost, _ in parts)
        trunk = min(common[start : end - 1])
        together = int(lengths[start:end].sum()) - (end - start - 1) * trunk + pass_cost
        if lowest and together < apart:
            return together, [(trunk, start, end)]
        return apart, [group for _, groups in parts for group in groups]

    return [(trunk, stems[start:end]) for trunk, start, end in best(0, len(stems))[1]] if stems else []


def _common(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> int:
    """Return the number of ids that two rows begin with alike."""
    length = min(len(left), len(right))
    differ = left[:length] != right[:length]
    return int(differ.argmax()) if differ.any() else length
