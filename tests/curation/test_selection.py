"""Importance resampling against a naive implementation, and selection by domain, source and budget."""

import math
from collections import Counter

import numpy as np
import pytest

from lightning_lm.curation import (
    DomainCap,
    ImportanceResampling,
    KeepLongest,
    Removed,
    SourceSampling,
    TokenBudget,
    apply_corpus_step,
    as_document,
    ngram_features,
)
from lightning_lm.curation.decisions import uniform_of_ids
from lightning_lm.data import Texts
from lightning_lm.errors import ConfigurationError, DataError

DRAW = np.random.default_rng(0)
NEWS = ["market", "rose", "today", "the", "bank", "said"]
CODE = ["def", "return", "import", "class", "the", "self"]
TARGET = [" ".join(DRAW.choice(NEWS, 20)) for _ in range(20)]
DOCUMENTS = [
    as_document(
        " ".join(DRAW.choice(NEWS if number % 3 == 0 else CODE, int(DRAW.integers(1, 12)))),
        url=f"https://{'www.' * (number % 2)}site{number % 4}.org/{number}",
        metadata={"source": "abc"[min(number % 10, 2)], "number": number},
    )
    for number in range(200)
]


def kept(step, documents=DOCUMENTS) -> list:
    return [result for result in apply_corpus_step(step, documents) if not isinstance(result, Removed)]


def naive_scores(buckets: int, max_ngram: int) -> list[float]:
    def grams(text):
        return [int(value) % buckets for value in ngram_features(text, max_ngram)]

    target = Counter(gram for text in TARGET for gram in grams(text))
    corpus = Counter(gram for document in DOCUMENTS for gram in grams(document.text))

    def probability(counts, gram):
        total = sum(counts.values())
        return (counts[gram] / total + 1e-5) / (1 + buckets * 1e-5)

    return [
        sum(math.log(probability(target, gram) / probability(corpus, gram)) for gram in grams(document.text))
        for document in DOCUMENTS
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_importance_resampling_is_the_naive_one(temperature):
    noise = [-math.log(-math.log(value)) for value in uniform_of_ids([d.id for d in DOCUMENTS], 5)]
    scores = [score + temperature * extra for score, extra in zip(naive_scores(500, 2), noise, strict=True)]
    expected = {DOCUMENTS[index].id for index in np.argsort(scores)[::-1][:50]}
    step = ImportanceResampling(Texts(TARGET), num_documents=50, buckets=500, temperature=temperature, seed=5)
    assert {document.id for document in kept(step)} == expected
    removed = next(result for result in apply_corpus_step(step, DOCUMENTS) if isinstance(result, Removed))
    assert removed.rule == "importance"
    assert removed.value < removed.limit


def test_gumbel_noise_samples_in_proportion_to_the_importance():
    documents = [as_document(text, url=str(number)) for number in range(150) for text in ("aa", "bb")]
    step = ImportanceResampling(Texts(["aa aa aa bb"]), fraction=0.1, max_ngram=1, buckets=1 << 20, smoothing=1e-9)
    counts = Counter(document.text for document in kept(step, documents))
    assert counts.total() == 30
    assert 0.6 < counts["aa"] / 30 < 0.9  # 0.75 and two standard errors


def test_selections_do_not_depend_on_shards():
    for step in (
        ImportanceResampling(Texts(TARGET), fraction=0.3),
        DomainCap(3),
        SourceSampling(temperature=2.0),
        TokenBudget(300),
    ):
        documents = sorted(DOCUMENTS, key=lambda document: document.id)
        summaries = [step.summarize(documents[index::3]) for index in range(3)]
        for order in (summaries, summaries[::-1]):
            decision = step.decide([*order, step.summarize([])])
            results = [step.apply(document, decision) for document in DOCUMENTS]
            assert [type(result) for result in results] == [type(r) for r in apply_corpus_step(step, DOCUMENTS)]
        step.decide([])


def test_a_domain_has_at_most_so_many_documents():
    found = kept(DomainCap(7))
    assert Counter(document.url.split("site")[1][0] for document in found) == dict.fromkeys("0123", 7)
    longest = kept(DomainCap(1, keep=KeepLongest()))
    for document in longest:
        site = document.url.split("site")[1][0]
        assert len(document.text) == max(len(d.text) for d in DOCUMENTS if d.url.split("site")[1][0] == site)
    removed = next(result for result in apply_corpus_step(DomainCap(7), DOCUMENTS) if isinstance(result, Removed))
    assert (removed.rule, removed.limit) == ("domain_cap", 7)
    assert removed.value.startswith("site")


def sizes(documents) -> Counter:
    counts = Counter()
    for document in documents:
        counts[document.metadata["source"]] += len(document.text)
    return counts


def test_sources_get_their_fractions():
    documents = [as_document("x" * 10, metadata={"source": "abc"[min(n % 10, 2)], "n": n}) for n in range(4000)]
    assert len(kept(SourceSampling(), documents)) == 4000
    weighted = sizes(kept(SourceSampling(weights={"a": 1, "c": 2}), documents))
    assert weighted["b"] == 0
    assert weighted["a"] == 4000  # the scarcest in relation to its weight is kept whole
    assert weighted["c"] == pytest.approx(8000, rel=0.15)
    warm = sizes(kept(SourceSampling(temperature=2.0), documents))
    assert warm["c"] / warm["a"] == pytest.approx(math.sqrt(8), rel=0.15)
    with pytest.raises(DataError, match="No document has source='d'; the sources are a, b, c"):
        kept(SourceSampling(weights={"d": 1}), documents)
    with pytest.raises(ConfigurationError, match="must be above 0"):
        SourceSampling(weights={"a": 0})


def test_a_budget_is_not_exceeded_and_nearly_used():
    for step in (TokenBudget(500, bytes_per_token=2.0), TokenBudget(500, bytes_per_token=2.0, keep=KeepLongest())):
        total = sum(len(document.text) for document in kept(step))
        assert 1000 - 100 < total <= 1000
    longest = kept(TokenBudget(500, bytes_per_token=2.0, keep=KeepLongest()))
    assert min(len(d.text) for d in longest) >= max(len(d.text) for d in DOCUMENTS if d not in longest) - 1
    assert kept(TokenBudget(10**9)) == DOCUMENTS


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigurationError, match="needs either fraction="):
        ImportanceResampling("target/")
    with pytest.raises(ConfigurationError, match="needs either fraction="):
        ImportanceResampling("target/", fraction=1.5)
    with pytest.raises(DataError, match="has no words"):
        ImportanceResampling(Texts(["!"]), fraction=0.5).decide([])
