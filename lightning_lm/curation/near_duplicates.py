"""Near-duplicate documents by MinHash and locality-sensitive hashing, verified by their true Jaccard index.

A summary has the bands and the shingles of each document of a shard. Documents that share a band are compared by their
shingles, so a chance collision removes nothing. Pairs that are similar enough make connected components, of which a
rule keeps one document. Bands are independent of each other: a worker may decide about one of them, and only verified
pairs come together in the end.

A pair is compared only if its documents are not yet in one component, so a page with ten thousand copies costs ten
thousand comparisons, not fifty million.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.components import Components
from lightning_lm.curation.decisions import ids_of, removal
from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.keep import KeepLongest, KeepRule
from lightning_lm.curation.minhash import MinHash
from lightning_lm.curation.shingles import jaccard, shingles
from lightning_lm.curation.step import Arrays
from lightning_lm.parts import Limit, Part

__all__ = ["NearDuplicates"]

_LIMITS = {
    "similarity": Limit.FRACTION,
    **dict.fromkeys(("ngram", "bands", "rows", "max_comparisons", "memory_mb"), Limit.COUNT),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicates(Part, limits=_LIMITS):
    """Removes all but one of the documents that are copies of each other but for small changes.

    Args:
        similarity: Smallest Jaccard index of the shingles of two copies.
        ngram: Words of a shingle.
        bands: Number of bands; more find more pairs and compare more.
        rows: Permutations of a band; more compare fewer pairs that are not similar.
        keep: Rule for the copy that is kept.
        max_comparisons: Most documents of one band that a document is compared with. Reached only by a band with
            thousands of documents that are no copies of each other.
        memory_mb: Shingles that are compared at a time, MB.
        seed: Seed of the permutations.

    Example:
        >>> from lightning_lm.curation import NearDuplicates, apply_corpus_step, as_document
        >>> texts = ["a long text about nothing at all " * 9, "A long text, about nothing at all! " * 9, "another text"]
        >>> [type(result).__name__ for result in apply_corpus_step(NearDuplicates(), map(as_document, texts))]
        ['Removed', 'Document', 'Document']
    """

    similarity: float = 0.8
    ngram: int = 5
    bands: int = 16
    rows: int = 8
    keep: KeepRule = KeepLongest()
    max_comparisons: int = 1000
    memory_mb: int = 256
    seed: int = 1

    @property
    def partitions(self) -> int:
        """Number of parts in which a decision can be made: one for each band."""
        return self.bands

    def summarize(self, documents: Sequence[Document]) -> Arrays:
        """Return ids, priorities, shingles and bands of documents; a text without words has no shingles.

        Args:
            documents: Documents of a shard.
        """
        sets = [shingles(document.text, self.ngram) for document in documents]
        sizes = np.array([len(values) for values in sets], np.int64)
        together = np.concatenate([np.zeros(0, np.uint32), *sets])
        minhash = MinHash(self.bands, self.rows, self.seed)
        signatures = minhash.signatures(together, sizes)
        bands = {f"band_{index}": keys for index, keys in enumerate(minhash.band_keys(signatures))}
        return {
            "ids": ids_of(documents),
            "priorities": np.array([self.keep.priority(document) for document in documents], np.float64),
            "sizes": sizes,
            "shingles": together,
            **bands,
        }

    def partial(self, summaries: Sequence[Arrays], partition: int) -> Arrays:
        """Return the pairs that one band finds and the shingles confirm.

        Args:
            summaries: Summaries of all shards.
            partition: Index of the band.
        """
        corpus = _Corpus.of(summaries)
        return self._pairs(corpus, summaries, partition, Components(len(corpus.ids)))

    def merge(self, partials: Sequence[Arrays]) -> Arrays:
        """Return the documents to remove, each with the one that is kept instead.

        Args:
            partials: Pairs of each band.
        """
        pairs = np.concatenate([partial["ids"] for partial in partials])
        priorities = np.concatenate([partial["priorities"] for partial in partials]).ravel()
        ids, first, inverse = np.unique(pairs.ravel(), return_index=True, return_inverse=True)
        components = Components(len(ids))
        for one, other in inverse.reshape(-1, 2).tolist():
            components.join(one, other)
        removed, kept = [], []
        for group in components.groups():
            best = group[np.argmax(priorities[first[group]])]
            removed.append(ids[group[group != best]])
            kept.append(np.repeat(ids[best], len(group) - 1))
        if not removed:
            return {"removed": ids[:0], "kept": ids[:0]}
        names, instead = np.concatenate(removed), np.concatenate(kept)
        order = np.argsort(names)
        return {"removed": names[order], "kept": instead[order]}

    def decide(self, summaries: Sequence[Arrays]) -> Arrays:
        """Return the documents to remove. Pairs that one band has found are not compared again in the next.

        Args:
            summaries: Summaries of all shards.
        """
        corpus = _Corpus.of(summaries)
        components = Components(len(corpus.ids))
        return self.merge([self._pairs(corpus, summaries, band, components) for band in range(self.bands)])

    def apply(self, document: Document, decision: Arrays) -> Document | Removed:
        """Return the document, or its removal with the id of the copy that is kept.

        Args:
            document: One of the documents that were summarized.
            decision: Result of `decide`.
        """
        return removal(document, "near_duplicate", decision) or document

    def _pairs(self, corpus: "_Corpus", summaries: Sequence[Arrays], band: int, components: Components) -> Arrays:
        """Join documents that are similar, and return the pairs that joined them."""
        found: list[tuple[int, int]] = []
        for buckets in corpus.buckets(summaries, band, components, self.memory_mb << 18):
            sets = corpus.shingles_of(summaries, np.unique(np.concatenate(buckets)))
            for bucket in buckets:
                found += self._compare(bucket.tolist(), sets, components)
        rows = np.array(found, np.int64).reshape(-1, 2)
        return {"ids": corpus.ids[rows], "priorities": corpus.priorities[rows]}

    def _compare(
        self, bucket: list[int], sets: dict[int, NDArray[np.uint32]], components: Components
    ) -> Iterator[tuple[int, int]]:
        """Join similar documents of one bucket, each compared with those before it in other components."""
        places: dict[int, list[int]] = {}
        for place, one in enumerate(bucket):
            for root, others in list(places.items()):
                if components.find(root) == components.find(one):
                    continue
                recent = others[bisect.bisect_left(others, place - self.max_comparisons) :]
                match = next((bucket[other] for other in recent if self._similar(sets[one], sets[bucket[other]])), None)
                if match is not None:
                    yield one, match
                    joined = sorted(others + places.pop(components.find(one), []))
                    components.join(one, match)
                    del places[root]
                    places[components.find(one)] = joined
            places.setdefault(components.find(one), []).append(place)

    def _similar(self, first: NDArray[np.uint32], second: NDArray[np.uint32]) -> bool:
        small, large = sorted((len(first), len(second)))
        return small >= self.similarity * large and jaccard(first, second) >= self.similarity


@dataclasses.dataclass(frozen=True, slots=True)
class _Corpus:
    """Documents of all shards in the order of their ids.

    Args:
        ids: bytes [documents].
        priorities: float64 [documents].
        sizes: int64 [documents], number of shingles.
        ranks: Index of each document of each shard in this order, int64.
    """

    ids: NDArray[np.bytes_]
    priorities: NDArray[np.float64]
    sizes: NDArray[np.int64]
    ranks: list[NDArray[np.int64]]

    @classmethod
    def of(cls, summaries: Sequence[Arrays]) -> "_Corpus":
        ids = np.concatenate([np.zeros(0, np.bytes_), *(summary["ids"] for summary in summaries)])
        order = np.argsort(ids)
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order))
        priorities = np.concatenate([np.zeros(0), *(summary["priorities"] for summary in summaries)])
        sizes = [np.zeros(0, np.int64), *(summary["sizes"] for summary in summaries)]
        stops = np.cumsum([len(part) for part in sizes])[:-1]
        return cls(ids[order], priorities[order], np.concatenate(sizes)[order], np.split(ranks, stops)[1:])

    def buckets(
        self, summaries: Sequence[Arrays], band: int, components: Components, limit: int
    ) -> Iterator[list[NDArray[np.int64]]]:
        """Yield buckets with documents of several components, in the order of ids, at most `limit` shingles at once."""
        keys = np.empty(len(self.ids), np.uint64)
        for summary, ranks in zip(summaries, self.ranks, strict=True):
            keys[ranks] = summary[f"band_{band}"]
        places = np.flatnonzero(self.sizes)
        places = places[np.argsort(keys[places], kind="stable")]
        edges = np.flatnonzero(np.diff(keys[places])) + 1
        begins, ends = np.append(0, edges), np.append(edges, len(places))
        shared = ends - begins > 1
        group: list[NDArray[np.int64]] = []
        total = 0
        for begin, end in zip(begins[shared], ends[shared], strict=True):
            bucket = places[begin:end]
            if len(set(map(components.find, bucket.tolist()))) == 1:
                continue
            size = int(self.sizes[bucket].sum())
            if group and total + size > limit:
                yield group
                group, total = [], 0
            group.append(bucket)
            total += size
        if group:
            yield group

    def shingles_of(self, summaries: Sequence[Arrays], wanted: NDArray[np.int64]) -> dict[int, NDArray[np.uint32]]:
        """Return the shingles of documents, read from one shard after the other."""
        found: dict[int, NDArray[np.uint32]] = {}
        for summary, ranks in zip(summaries, self.ranks, strict=True):
            rows = np.flatnonzero(np.isin(ranks, wanted))
            if len(rows):
                values, ends = summary["shingles"], np.cumsum(summary["sizes"])
                begins = ends - summary["sizes"]
                found.update({int(ranks[row]): values[begins[row] : ends[row]].copy() for row in rows})
        return found
