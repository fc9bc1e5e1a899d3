"""Items of a task that occur in training documents, found by word n-grams, and the score on the others.

Documents are streamed past a sorted index of the items' n-grams. Reported are the items with a shared 13-gram (Brown et
al. 2020, arXiv:2005.14165, appendix C) or 8-gram, and the fraction of an item's n-grams that one document has (Touvron
et al. 2023, arXiv:2307.09288, section A.6, counts tokens instead).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from lightning_lm.curation import EvaluationIndex
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals.requests import RollingLikelihood
from lightning_lm.evals.task import Item, Task

__all__ = ["ContaminationReport", "find_contamination"]


@dataclasses.dataclass(frozen=True)
class ContaminationReport:
    """Overlap of the items of a task with training documents.

    Args:
        overlaps: Largest fraction of an item's n-grams that one document contains, by the id of the item; items
            without any are left out.
        num_items: Items of the task.
        num_skipped: Items that have too few words to be looked for.
        num_documents: Documents that were read.
        ngram: Words of an n-gram.
    """

    overlaps: Mapping[str, float]
    num_items: int
    num_skipped: int
    num_documents: int
    ngram: int

    def scores(self, task: Task, scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Return the metrics of a task over all items, over the clean ones and over the contaminated ones.

        Args:
            task: The task.
            scores: Metrics of each item by its id, as `Task.score` returns them.
        """
        parts = {
            "all": list(scores.values()),
            "clean": [metrics for name, metrics in scores.items() if name not in self.overlaps],
            "contaminated": [metrics for name, metrics in scores.items() if name in self.overlaps],
        }
        return {name: task.aggregate(part) if part else {} for name, part in parts.items()}


def find_contamination(
    items: Sequence[Item], documents: Iterable[str], *, ngram: int = 13, min_words: int = 8
) -> ContaminationReport:
    """Return which items occur in documents.

    Args:
        items: Items of a task.
        documents: Texts of training documents: those of a `lightning_lm.data.Source`, or decoded from a token store.
        ngram: Words of an n-gram: 13, or 8 to find more.
        min_words: Fewest words of an item that is looked for.

    Raises:
        ConfigurationError: If no item has enough words.

    Example:
        >>> from lightning_lm.evals import Likelihood, Prompt
        >>> asked = Likelihood(Prompt("What is the sum of the first hundred odd natural numbers?"), " 10000")
        >>> report = find_contamination([Item("a", (asked,), gold=0)], ["the sum of the first hundred odd"], ngram=5)
        >>> round(report.overlaps["a"], 2)
        0.43
    """
    index = EvaluationIndex((_text(item) for item in items), ngram=ngram, min_words=min_words)
    if index.num_items == index.num_skipped:
        raise ConfigurationError(
            f"None of the {index.num_items} items has {min(min_words, ngram)} words, so nothing can be found; lower "
            "min_words."
        )
    overlaps: dict[str, float] = {}
    number = 0
    for document in documents:
        number += 1
        for item, overlap in index.overlaps(document).items():
            name = items[item].id
            overlaps[name] = max(overlaps.get(name, 0.0), overlap)
    return ContaminationReport(overlaps, index.num_items, index.num_skipped, number, ngram)


def _text(item: Item) -> str:
    if item.text:
        return item.text
    request = item.requests[0]
    return request.text if isinstance(request, RollingLikelihood) else request.prompt.question
