"""Selection by size: caps per domain, weights and temperature over sources, and a budget of tokens.

The selected documents follow from a number drawn for each id, or from a rule, so a run in another order or with other
shards selects the same ones.
"""

import dataclasses
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.decisions import ids_of, uniform_of_ids
from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.keep import KeepRule
from lightning_lm.curation.step import Arrays
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Limit, Part

__all__ = ["DomainCap", "SourceSampling", "TokenBudget", "domain_of"]


def domain_of(url: str | None) -> str:
    """Return the host of an address without ``www.``; the text before the first slash if there is no scheme.

    Args:
        url: Address of a page, or None.

    Example:
        >>> domain_of("https://www.Example.org:80/page"), domain_of("example.org/page"), domain_of(None)
        ('example.org', 'example.org', '')
    """
    if not url:
        return ""
    try:
        host = urllib.parse.urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:  # such as an open bracket
        host = url.partition("/")[0]
    return host.removeprefix("www.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainCap(Part, limits={"max_documents": Limit.COUNT}):
    """Keeps at most a number of documents of each domain; documents without an address are one domain.

    Args:
        max_documents: Most documents of a domain.
        keep: Rule for the documents that are kept; by default they are chosen at random.
        seed: Seed of the random choice.
    """

    max_documents: int = dataclasses.field(kw_only=False)
    keep: KeepRule | None = None
    seed: int = 0

    def summarize(self, documents: Sequence[Document]) -> Arrays:
        """Return ids, domains and priorities.

        Args:
            documents: Documents of a shard.
        """
        return {
            "ids": ids_of(documents),
            "domains": np.array([domain_of(document.url).encode() for document in documents], np.bytes_),
            "priorities": _priorities(documents, self.keep, self.seed),
        }

    def decide(self, summaries: Sequence[Arrays]) -> Arrays:
        """Return the sorted ids of the documents to remove.

        Args:
            summaries: Summaries of all shards.
        """
        ids, domains, priorities = (_joined(summaries, name) for name in ("ids", "domains", "priorities"))
        _, groups = np.unique(domains, return_inverse=True)
        order = np.lexsort((ids, -priorities.astype(np.float64), groups))
        begins = np.searchsorted(groups[order], groups[order])
        return {"removed": np.sort(ids[order[np.arange(len(order)) - begins >= self.max_documents]])}

    def apply(self, document: Document, decision: Arrays) -> Document | Removed:
        """Return the document, or its removal with its domain.

        Args:
            document: One of the documents that were summarized.
            decision: Result of `decide`.
        """
        removed, key = decision["removed"], document.id.encode()
        place = int(np.searchsorted(removed, key))
        if place == len(removed) or removed[place] != key:
            return document
        return Removed(document, "domain_cap", domain_of(document.url), self.max_documents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSampling(Part, limits={"temperature": Limit.COUNT}):
    """Draws documents so that sources have given fractions of the bytes. No document is repeated.

    As much is kept as the scarcest source allows. Without weights, a source of n bytes gets a fraction in proportion to
    n ** (1 / temperature): 1 changes nothing, larger temperatures raise small sources (Conneau et al. 2020, who write
    alpha for 1 / temperature).

    Args:
        weights: Weight of each source by its name; sources without one are removed.
        temperature: Temperature of the fractions, at least 1; only without weights.
        field: Metadata field with the name of the source.
        seed: Seed of the draw.

    Raises:
        ConfigurationError: If weights are not positive, or come with a temperature.
    """

    weights: Mapping[str, float] | None = None
    temperature: float = 1.0
    field: str = "source"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and (
            self.temperature != 1 or not all(value > 0 for value in self.weights.values())
        ):
            raise ConfigurationError(
                f"weights={dict(self.weights)} must be above 0, and come without temperature={self.temperature}."
            )

    def summarize(self, documents: Sequence[Document]) -> Arrays:
        """Return the bytes of each source.

        Args:
            documents: Documents of a shard.
        """
        sizes: dict[str, int] = {}
        for document in documents:
            name = str(document.metadata.get(self.field, ""))
            sizes[name] = sizes.get(name, 0) + _num_bytes(document)
        names = sorted(sizes)
        return {
            "sources": np.array([name.encode() for name in names], np.bytes_),
            "bytes": np.array([sizes[name] for name in names], np.float64),
        }

    def decide(self, summaries: Sequence[Arrays]) -> Arrays:
        """Return the fraction of each source that is kept.

        Args:
            summaries: Summaries of all shards.

        Raises:
            DataError: If a source that has a weight has no document.
        """
        names, places = np.unique(_joined(summaries, "sources"), return_inverse=True)
        sizes = np.bincount(places, _joined(summaries, "bytes").astype(np.float64), len(names))
        if self.weights is None:
            wanted = sizes ** (1 / self.temperature)
        else:
            missing = sorted(set(self.weights) - {name.decode() for name in names})
            if missing and len(names):
                found = ", ".join(name.decode() or "(none)" for name in names)
                raise DataError(
                    f"No document has {self.field}={missing[0]!r}; the sources are {found}. Correct weights=, or name "
                    "another field=."
                )
            wanted = np.array([self.weights.get(name.decode(), 0.0) for name in names])
        rates = np.divide(wanted, sizes, out=np.zeros(len(names)), where=sizes > 0)
        return {"sources": names, "rates": rates / max(rates.max(initial=0.0), 1e-300)}

    def apply(self, document: Document, decision: Arrays) -> Document | Removed:
        """Return the document, or its removal with the fraction of its source that is kept.

        Args:
            document: One of the documents that were summarized.
            decision: Result of `decide`.
        """
        name = str(document.metadata.get(self.field, ""))
        rate = float(decision["rates"][np.searchsorted(decision["sources"], name.encode())])
        drawn = float(uniform_of_ids([document.id], self.seed)[0])
        return document if drawn < rate else Removed(document, "source_sampling", name, rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBudget(Part, limits={"num_tokens": Limit.COUNT, "bytes_per_token": Limit.POSITIVE}):
    """Keeps as many documents as a budget of tokens allows, at random or the best first.

    Args:
        num_tokens: Most tokens.
        bytes_per_token: UTF-8 bytes of a token, of which the compression ratio of a tokenizer is a good estimate.
        keep: Rule by which the best come first; by default documents are chosen at random.
        seed: Seed of the random choice.
    """

    num_tokens: int = dataclasses.field(kw_only=False)
    bytes_per_token: float = 4.0
    keep: KeepRule | None = None
    seed: int = 0

    def summarize(self, documents: Sequence[Document]) -> Arrays:
        """Return ids, priorities and bytes.

        Args:
            documents: Documents of a shard.
        """
        return {
            "ids": ids_of(documents),
            "priorities": _priorities(documents, self.keep, self.seed),
            "bytes": np.array([_num_bytes(document) for document in documents], np.float64),
        }

    def decide(self, summaries: Sequence[Arrays]) -> Arrays:
        """Return the priority and id of the first document that is beyond the budget, if there is one.

        Args:
            summaries: Summaries of all shards.
        """
        ids, priorities, sizes = (_joined(summaries, name) for name in ("ids", "priorities", "bytes"))
        priorities = priorities.astype(np.float64)
        order = np.lexsort((ids, -priorities))
        beyond = np.flatnonzero(np.cumsum(sizes[order].astype(np.float64)) > self.num_tokens * self.bytes_per_token)
        first = order[beyond[:1]]
        return {"ids": ids[first], "priorities": priorities[first]}

    def apply(self, document: Document, decision: Arrays) -> Document | Removed:
        """Return the document, or its removal if it comes after the budget is spent.

        Args:
            document: One of the documents that were summarized.
            decision: Result of `decide`.
        """
        if not len(decision["ids"]):
            return document
        place = (-float(_priorities([document], self.keep, self.seed)[0]), document.id.encode())
        end = (-float(decision["priorities"][0]), bytes(decision["ids"][0]))
        return document if place < end else Removed(document, "token_budget", limit=self.num_tokens)


def _priorities(documents: Sequence[Document], keep: KeepRule | None, seed: int) -> NDArray[np.float64]:
    if keep is None:
        return uniform_of_ids([document.id for document in documents], seed)
    return np.array([keep.priority(document) for document in documents], np.float64)


def _joined(summaries: Sequence[Arrays], name: str) -> NDArray[Any]:
    return np.concatenate([summary[name] for summary in summaries] or [np.zeros(0, np.bytes_)])


def _num_bytes(document: Document) -> int:
    return len(document.text.encode("utf-8", "surrogatepass"))
