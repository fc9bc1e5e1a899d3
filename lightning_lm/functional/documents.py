"""Boundaries of documents in packed rows: which keys a query may see, as a fold, a mask, or one number per query."""

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Documents", "SharedPrefixes", "band", "distances", "first_visible"]


class SharedPrefixes(NamedTuple):
    """Earlier tokens that documents continue: their keys and values are seen again instead of computed again."""

    lengths: tuple[int, ...]
    """Tokens before each document of a run, one number per run; 0 if it continues nothing."""
    tokens: Int[Tensor, " prefix_tokens"]
    """Their places in the rows laid end to end, document after document."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Boundaries of the documents in packed rows. Made once per batch and read by every layer."""

    ids: Int[Tensor, "batch seq"]
    """Equal inside a document, different in neighbouring ones."""
    runs: tuple[tuple[int, int], ...]
    """(count, length) of documents of equal length that follow each other, rows laid end to end; empty off the CPU."""
    prefixes: SharedPrefixes | None = None
    """Tokens of other documents that documents continue; ``None`` if none does. On a CPU only."""
    prefix_lengths: Int[Tensor, "batch seq"] | None = None
    """Tokens at the start of each token's document that see each other in both directions; ``None`` for none."""
    run_prefixes: tuple[int, ...] = ()
    """The same as one number for each run; empty if there are none."""
    _masks: dict[tuple[int | None, bool], Tensor] = field(default_factory=dict)
    _first: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def from_ids(
        cls, document_ids: Int[Tensor, "batch seq"], prefix_lengths: Int[Tensor, "batch seq"] | None = None
    ) -> "Documents | None":
        """Find the documents, or return ``None`` where each row is a single one and plain causal attention is right.

        Off the CPU nothing is read back from the device, so ``None`` is never returned there.

        Args:
            document_ids: Equal inside a document, different in neighbouring ones.
            prefix_lengths: See the attribute.
        """
        if document_ids.device.type != "cpu":
            documents = cls(ids=document_ids, runs=(), prefix_lengths=prefix_lengths)
            documents.first_keys()  # here, so that layers which are compiled one by one all find it
            return documents
        seq = document_ids.size(1)
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        torch.ne(document_ids[:, 1:], document_ids[:, :-1], out=starts[:, 1:])
        places = [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]
        lengths = [end - start for start, end in pairwise(places)]
        if prefix_lengths is None or not bool(prefix_lengths.any()):
            runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
            return None if runs == ((document_ids.size(0), seq),) else cls(ids=document_ids, runs=runs)
        prefixes = prefix_lengths.flatten()[places[:-1]].tolist()
        alike = [(len(list(group)), *pair) for pair, group in groupby(zip(lengths, prefixes, strict=True))]
        runs = tuple((count, length) for count, length, _ in alike)
        return cls(
            ids=document_ids,
            runs=runs,
            prefix_lengths=prefix_lengths,
            run_prefixes=tuple(min(prefix, length) for _, length, prefix in alike),
        )

    def mask(self, window: int | None = None, *, causal: bool = True) -> Bool[Tensor, "batch 1 seq seq"]:
        """Return which keys each query may see: those of its own document (within the window).

        Args:
            window: Keys at this distance and beyond are not seen.
            causal: Later keys are not seen, unless they belong to the document's prefix.
        """
        if (window, causal) not in self._masks:
            visible = self.ids[:, :, None] == self.ids[:, None, :]
            distance = distances(self.ids.size(1), self.ids.size(1), device=self.ids.device)
            if causal:
                earlier = distance >= 0
                if self.prefix_lengths is not None:
                    earlier = earlier | (self.positions() < self.prefix_lengths)[:, None, :]
                visible = visible & earlier
            if window is not None:
                visible = visible & (distance.abs() < window)
            self._masks[window, causal] = visible.unsqueeze(1)
        return self._masks[window, causal]

    def first_keys(self, window: int | None = None) -> Int[Tensor, "batch seq"]:
        """Return the first key that each query may see: the same mask, as one number per query."""
        if window not in self._first:
            columns = torch.arange(self.ids.size(1), device=self.ids.device)
            self._first[window] = first_visible(columns - self.positions(), window).int()
        return self._first[window]

    def positions(self) -> Int[Tensor, "batch seq"]:
        """Return the place of each token in its document, from 0."""
        columns = torch.arange(self.ids.size(1), device=self.ids.device).expand_as(self.ids)
        begins = torch.zeros_like(self.ids)
        begins[:, 1:] = torch.where(self.ids[:, 1:] != self.ids[:, :-1], columns[:, 1:], 0)
        return columns - begins.cummax(dim=1).values


def first_visible(document_starts: Int[Tensor, "batch seq"], window: int | None = None) -> Int[Tensor, "batch seq"]:
    """Return the first key that each query sees: the start of its document, or of its window if that is later.

    Args:
        document_starts: Column where the document of each token begins; zeros where a row is a single one.
        window: Keys a query sees, itself included; ``None`` for all.
    """
    if window is None:
        return document_starts
    columns = torch.arange(document_starts.size(1), device=document_starts.device, dtype=document_starts.dtype)
    return torch.maximum(document_starts, columns - (window - 1))


def band(queries: int, keys: int, window: int | None, *, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Return which keys each query may see, where the queries are the last of the keys."""
    distance = distances(queries, keys, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def distances(queries: int, keys: int, *, device: torch.device) -> Int[Tensor, "queries keys"]:
    """Return how far each key lies before each query, where the queries are the last of the keys."""
    return torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
