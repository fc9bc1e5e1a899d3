"""Exact documents and lines against dictionaries of the texts themselves."""

import random
from collections import Counter

import numpy as np
import pytest

from lightning_lm.curation import (
    DuplicateLines,
    ExactDuplicates,
    KeepHighest,
    Removed,
    apply_corpus_step,
    as_document,
)

LINES = ["Home", "  Home ", "", "Log in", "A sentence.", "naïve", "x\u0085y", "\ttab", "a\r", "\ud800"]


def pages(seed: int) -> list:
    draw = random.Random(seed)
    texts = ["\n".join(draw.choices([*LINES, *map(str, range(60))], k=draw.randint(0, 9))) for _ in range(40)]
    return [as_document(text, url=str(number)) for number, text in enumerate(texts)]


def test_one_of_each_text_is_kept():
    documents = pages(0) + [as_document("", url=f"empty {number}") for number in range(3)]
    results = apply_corpus_step(ExactDuplicates(), documents)
    groups: dict[str, list[str]] = {}
    for document in documents:
        groups.setdefault(document.text, []).append(document.id)
    for document, result in zip(documents, results, strict=True):
        smallest = min(groups[document.text])
        if document.id == smallest:
            assert result is document
        else:
            assert (result.rule, result.duplicate_of) == ("exact_duplicate", smallest)


def test_the_rule_decides_which_copy_is_kept():
    copies = [as_document("same", metadata={"score": score}) for score in (1.0, 3.0, 2.0)]
    results = apply_corpus_step(ExactDuplicates(keep=KeepHighest("score")), copies)
    assert [isinstance(result, Removed) for result in results] == [True, False, True]


@pytest.mark.parametrize("max_copies", [1, 3])
@pytest.mark.parametrize("min_characters", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_lines_that_repeat_are_dropped(seed, min_characters, max_copies):
    documents = pages(seed)
    counts = Counter(line.strip() for document in documents for line in document.text.split("\n"))
    repeated = {line for line, n in counts.items() if n > max_copies and len(line) >= min_characters}
    step = DuplicateLines(min_characters=min_characters, max_copies=max_copies)
    for document, result in zip(documents, apply_corpus_step(step, documents), strict=True):
        expected = [line for line in document.text.split("\n") if line.strip() not in repeated]
        if isinstance(result, Removed):
            assert not "".join(expected).strip()
            assert result.rule == "duplicate_lines"
        else:
            assert result.text.split("\n") == expected


def test_the_first_copy_of_a_line_is_kept_on_request():
    documents, seen = pages(5), set()
    results = dict(
        zip([d.id for d in documents], apply_corpus_step(DuplicateLines(keep="first"), documents), strict=True)
    )
    for document in sorted(documents, key=lambda document: document.id):
        expected = []
        for line in document.text.split("\n"):
            if not line.strip() or line.strip() not in seen:
                expected.append(line)
            seen.add(line.strip())
        result = results[document.id]
        assert isinstance(result, Removed) or result.text.split("\n") == expected
        assert isinstance(result, Removed) == (not "".join(expected).strip() and document.text.strip() != "")


@pytest.mark.parametrize("step", [ExactDuplicates(), DuplicateLines(), DuplicateLines(keep="first")], ids=str)
def test_decisions_do_not_depend_on_shards(step):
    documents = sorted(pages(7), key=lambda document: document.id)
    whole = step.decide([step.summarize(documents)])
    for count in (2, 5):
        shards = [documents[index::count] for index in range(count)]
        parts = step.decide([step.summarize(shard) for shard in reversed(shards)])
        assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert len(whole) == len(step.decide([]))
    assert step.apply(documents[-1], step.decide([])) is documents[-1]
    step.decide([step.summarize([]), step.summarize(documents[:1])])
