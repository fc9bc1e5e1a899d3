"""Items of a task that occur in training documents, found by word n-grams, and the score on the others.

Documents are streamed past a sorted index of the items' n-grams, whose memory depends on the items alone. Reported are
the items with a shared 13-gram (Brown et al. 2020, arXiv:2005.14165, appendix C) or 8-gram, and the fraction of an
item's n-grams that one document has (Touvron et al. 2023, arXiv:2307.09288, section A.6, counts tokens instead). An
item is searched by the values of its record, without the words of the prompt's template.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lightning_lm.data import TokenStore
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals.requests import RollingLikelihood
from lightning_lm.evals.results import ItemResult, Overlap, Results, scores_of_items
from lightning_lm.evals.task import Item, Task
from lightning_lm.protocols import Tokenizer

__all__ = ["ContaminationReport", "find_contamination", "search_tasks", "store_documents", "with_contamination"]


@dataclasses.dataclass(frozen=True)
class ContaminationReport:
    """Overlap of the items of a task with training documents.

    Args:
        overlaps: Largest fraction of an item's n-grams that one document contains, by the id of the item; items
            without any are left out.
        num_items: Items of the task.
        skipped: Ids of the items that have too few words to be looked for: neither clean nor contaminated.
        num_documents: Documents that were read.
        ngram: Words of an n-gram.
    """

    overlaps: Mapping[str, float]
    num_items: int
    skipped: frozenset[str]
    num_documents: int
    ngram: int

    @property
    def num_skipped(self) -> int:
        """Number of items that have too few words to be looked for."""
        return len(self.skipped)

    def part_of(self, name: str) -> str:
        """Return ``clean``, ``contaminated`` or ``unsearched``.

        Args:
            name: Id of an item.
        """
        return "contaminated" if name in self.overlaps else "unsearched" if name in self.skipped else "clean"

    def scores(self, task: Task, scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Return the metrics of a task over all items, and over the clean, contaminated and unsearched ones.

        Args:
            task: The task.
            scores: Metrics of each item by its id, as `Task.score` returns them.
        """
        parts: dict[str, list[Mapping[str, float]]] = {"all": [], "clean": [], "contaminated": [], "unsearched": []}
        for name, metrics in scores.items():
            parts["all"].append(metrics)
            parts[self.part_of(name)].append(metrics)
        return {name: task.aggregate(part) if part else {} for name, part in parts.items()}


def find_contamination(
    items: Sequence[Item], documents: Iterable[str], *, ngram: int = 13, min_words: int = 8
) -> ContaminationReport:
    """Return which items occur in documents.

    Args:
        items: Items of a task.
        documents: Texts of training documents: those of a `lightning_lm.data.Source`, or of a token store
            (`store_documents`).
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
    report = search_tasks({"": items}, documents, ngram=ngram, min_words=min_words)[""]
    if report.num_items == report.num_skipped:
        raise ConfigurationError(
            f"None of the {report.num_items} items has {min(min_words, ngram)} words, so nothing can be found; lower "
            "min_words."
        )
    return report


def search_tasks(
    tasks: Mapping[str, Sequence[Item]], documents: Iterable[str], *, ngram: int = 13, min_words: int = 8
) -> dict[str, ContaminationReport]:
    """Return which items of several tasks occur in documents, which are read once.

    Args:
        tasks: Items of each task.
        documents: Texts of training documents.
        ngram: Words of an n-gram.
        min_words: Fewest words of an item that is looked for.
    """
    from lightning_lm.curation import EvaluationIndex

    names = [(task, item.id) for task, items in tasks.items() for item in items]
    texts = (_text(item) for items in tasks.values() for item in items)
    index = EvaluationIndex(texts, ngram=ngram, min_words=min_words)
    overlaps: dict[str, dict[str, float]] = {task: {} for task in tasks}
    number = 0
    for document in documents:
        number += 1
        for place, overlap in index.overlaps(document).items():
            task, name = names[place]
            overlaps[task][name] = max(overlaps[task].get(name, 0.0), overlap)
    skipped: dict[str, list[str]] = {task: [] for task in tasks}
    for place in index.skipped:
        skipped[names[place][0]].append(names[place][1])
    return {
        task: ContaminationReport(overlaps[task], len(items), frozenset(skipped[task]), number, ngram)
        for task, items in tasks.items()
    }


def store_documents(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts of the documents of a token store, one at a time.

    Args:
        store: The store.
        tokenizer: The tokenizer that it was written with.

    Raises:
        ConfigurationError: If it was written with another tokenizer.
    """
    if store.meta["tokenizer"] != tokenizer.fingerprint:
        raise ConfigurationError(
            f"The tokens of {store.path} are of another tokenizer ({store.meta['tokenizer'][:12]}) than the one that "
            f"would decode them ({tokenizer.fingerprint[:12]}). Give the tokenizer of the store, or the texts."
        )
    for document in range(len(store)):
        ids = store[document]
        if len(ids) and ids[-1] == store.eos_id:
            ids = ids[:-1]
        yield tokenizer.decode(ids.tolist())


def with_contamination(
    results: Results, tasks: Sequence[Task], documents: Iterable[str], *, ngram: int = 13
) -> Results:
    """Return results with the scores of each task's clean, contaminated and unsearched items beside those of all.

    Args:
        results: Results of the tasks.
        tasks: The tasks.
        documents: Texts of training documents.
        ngram: Words of an n-gram.
    """
    asked = {task.name: {item.id for item in task.items} for task in results.tasks}
    items = {task.name: [item for item in task.items() if item.id in asked[task.name]] for task in tasks}
    reports, by_name = search_tasks(items, documents, ngram=ngram), {task.name: task for task in tasks}
    found = []
    for task in results.tasks:
        report = reports[task.name]
        parts: dict[str, list[ItemResult]] = {}
        for item in task.items:
            parts.setdefault(report.part_of(item.id), []).append(item)
        scores = {part: scores_of_items(by_name[task.name], of_part) for part, of_part in sorted(parts.items())}
        overlap = Overlap(report.num_documents, ngram, dict(report.overlaps), sorted(report.skipped), scores)
        found.append(dataclasses.replace(task, contamination=overlap))
    return dataclasses.replace(results, tasks=found)


def _text(item: Item) -> str:
    if item.text:
        return item.text
    request = item.requests[0]
    return request.text if isinstance(request, RollingLikelihood) else request.prompt.question
