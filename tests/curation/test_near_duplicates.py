"""MinHash, locality-sensitive hashing and verification against brute force over all pairs."""

import random
import unicodedata
from itertools import combinations

import numpy as np
import pytest

from lightning_lm.curation import (
    CorpusStep,
    Document,
    KeepHighest,
    KeepShortest,
    NearDuplicates,
    PartitionedStep,
    Removed,
    apply_corpus_step,
    as_document,
)
from lightning_lm.curation.components import Components
from lightning_lm.curation.minhash import MinHash, collision_probability
from lightning_lm.curation.shingles import jaccard, shingles
from lightning_lm.errors import ConfigurationError, DataError


def corpus() -> list[Document]:
    """Return documents, some of them copies of another with words exchanged."""
    draw, texts = random.Random(0), []
    vocabulary = [f"w{number}" for number in range(2000)]
    for _ in range(120):
        words = draw.choices(vocabulary, k=draw.randint(3, 200))
        texts.append(" ".join(words))
        for _ in range(draw.choice([0, 0, 1, 4])):
            copy = list(words)
            for _ in range(draw.randint(0, 5)):
                copy[draw.randrange(len(copy))] = draw.choice(vocabulary)
            texts.append(" ".join(copy))
    return [as_document(text, url=str(number)) for number, text in enumerate(texts)]


DOCUMENTS = corpus()


def plain_shingles(text: str, n: int) -> set[tuple[str, ...]]:
    kept = [c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFD", text.lower())]
    words = "".join(kept).split()
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))} if words else set()


def clusters_by_brute_force(documents, similarity: float) -> set[frozenset[str]]:
    sets = [plain_shingles(document.text, 5) for document in documents]
    components = Components(len(sets))
    for one, other in combinations(range(len(sets)), 2):
        union = len(sets[one] | sets[other])
        if union and len(sets[one] & sets[other]) >= similarity * union:
            components.join(one, other)
    return {frozenset(documents[index].id for index in group) for group in components.groups()}


def clusters_of(results) -> set[frozenset[str]]:
    found: dict[str, set[str]] = {}
    for result in results:
        if isinstance(result, Removed):
            found.setdefault(result.duplicate_of, {result.duplicate_of}).add(result.document.id)
    return {frozenset(cluster) for cluster in found.values()}


def test_near_duplicates_are_those_of_brute_force():
    step = NearDuplicates(bands=64, rows=4)  # a pair of 0.8 is missed with probability 1e-15
    results = apply_corpus_step(step, DOCUMENTS)
    expected = clusters_by_brute_force(DOCUMENTS, 0.8)
    assert len(expected) > 20
    assert clusters_of(results) == expected
    by_id = {document.id: document for document in DOCUMENTS}
    for cluster in expected:  # the longest is kept, of equally long ones that with the smallest id
        kept = min(cluster, key=lambda one: (-len(by_id[one].text), one))
        assert all(result.id != one for one in cluster - {kept} for result in results if isinstance(result, Document))


def test_the_decision_does_not_depend_on_shards_or_on_who_decides():
    step = NearDuplicates()
    assert isinstance(step, CorpusStep)
    assert isinstance(step, PartitionedStep)
    expected = None
    for count in (1, 3, 8):
        shuffled = random.Random(count).sample(DOCUMENTS, len(DOCUMENTS))
        shards = [sorted(shuffled[index::count], key=lambda document: document.id) for index in range(count)]
        summaries = [step.summarize(shard) for shard in shards]
        in_parts = step.merge([step.partial(summaries, band) for band in range(step.partitions)])
        for decision in (step.decide(summaries), in_parts):
            found = dict(zip(decision["removed"].tolist(), decision["kept"].tolist(), strict=True))
            expected = expected or found
            assert found == expected
    small = NearDuplicates(memory_mb=1)
    many = [small.summarize(DOCUMENTS)]
    object.__setattr__(small, "memory_mb", 0)  # every bucket is compared by itself
    decision = small.decide(many)
    assert dict(zip(decision["removed"].tolist(), decision["kept"].tolist(), strict=True)) == expected


def flat(*sets):
    sizes = np.array([len(values) for values in sets], np.int64)
    return np.concatenate([np.zeros(0, np.uint32), *sets]), sizes


def test_permutations_estimate_the_jaccard_index():
    random_numbers, minhash = np.random.default_rng(0), MinHash(16, 8, seed=1)
    errors = []
    for similarity in np.repeat([0.1, 0.5, 0.9], 60):
        union = random_numbers.integers(0, 1 << 32, 600, np.uint32)
        common = union[: int(600 * similarity)]
        rest = np.array_split(union[len(common) :], 2)
        first, second = minhash.signatures(*flat(*(np.concatenate([common, part]) for part in rest)))
        errors.append((first == second).mean() - len(common) / 600)
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.045  # sqrt(s (1 - s) / 128) is 0.044 at 0.5


def test_signatures_are_the_minima_of_permutations_whatever_stands_beside_a_set():
    draw, minhash = np.random.default_rng(0), MinHash(2, 3, seed=0)
    lengths = (0, 3, 70_000, 0, 1, 40_000, 65_536, 200_000, 9, 0)
    sets = [draw.integers(0, 1 << 32, length, np.uint32) for length in lengths]
    found = minhash.signatures(*flat(*sets))
    factors = zip(minhash._multipliers.tolist(), minhash._offsets.tolist(), strict=True)
    for index, (factor, offset) in enumerate(factors):
        for row, values in enumerate(sets):
            permuted = (values.astype(np.uint64) * factor + offset) % (1 << 32)
            assert found[row, index] == (permuted.min() if len(values) else 0)
    assert minhash.signatures(*flat()).shape == (0, 6)
    assert not minhash.signatures(*flat(sets[0])).any()


def test_bands_find_pairs_as_often_as_theory_says():
    draw, minhash, hits = np.random.default_rng(1), MinHash(16, 8, seed=3), 0
    for _ in range(300):
        union = draw.integers(0, 1 << 32, 400, np.uint32)
        pair = [np.concatenate([union[:280], part]) for part in np.array_split(union[280:], 2)]  # similarity 0.7
        keys = minhash.band_keys(minhash.signatures(*flat(*pair)))
        hits += bool((keys[:, 0] == keys[:, 1]).any())
    assert hits / 300 == pytest.approx(collision_probability(0.7, 16, 8), abs=0.08)


@pytest.mark.parametrize(
    ("text", "other"),
    [("Crème brûlée, twice!", "creme brulee"), ("ÉCOLE", "e\u0301cole"), ("a  b\n\tc", "A-B. C?"), ("", " .,! ")],
)
def test_shingles_are_those_of_the_normal_form(text, other):
    for one in (text, other, f"{text} {other} " * 3, "naïve 東京タワー हिन्दी \ud800 x"):
        assert len(shingles(one, 3)) == len(plain_shingles(one, 3))
    same = plain_shingles(text, 2) == plain_shingles(other, 2)
    assert (shingles(text, 2).tolist() == shingles(other, 2).tolist()) == same


def test_a_long_text_is_cut_at_spaces():
    text = " ".join(f"word{number}" for number in range(60_000)) + "é"  # 600 kB
    assert len(shingles(text, 5)) == pytest.approx(59_996, abs=2)  # 32-bit hashes collide once in a while
    assert jaccard(shingles(text, 5), shingles("other " + text, 5)) > 0.9999


def test_empty_texts_are_no_duplicates_and_the_rule_decides_who_is_kept():
    empty = [as_document("", str(number)) for number in range(3)]
    assert apply_corpus_step(NearDuplicates(), empty) == empty
    assert len(NearDuplicates().decide([])["removed"]) == 0
    text = "a page of one site that was copied by another site " * 4
    copies = [as_document(text + ending, metadata={"score": score}) for ending, score in (("", 2), ("!", 3), ("!!", 1))]
    for keep, kept in ((KeepHighest("score"), 1), (KeepShortest(), 0)):
        results = apply_corpus_step(NearDuplicates(keep=keep), copies)
        assert [isinstance(result, Document) for result in results] == [index == kept for index in range(3)]
        assert results[2].duplicate_of == copies[kept].id
        assert results[2].rule == "near_duplicate"
    with pytest.raises(DataError, match="KeepHighest needs a number"):
        NearDuplicates(keep=KeepHighest("missing")).summarize(copies)


def test_many_copies_cost_one_comparison_each(monkeypatch):
    counted = []
    monkeypatch.setattr(
        "lightning_lm.curation.near_duplicates.jaccard", lambda *sets: counted.append(1) or jaccard(*sets)
    )
    copies = [as_document(" ".join(map(str, range(100 + number % 3))), str(number)) for number in range(500)]
    results = apply_corpus_step(NearDuplicates(), copies)
    assert sum(isinstance(result, Removed) for result in results) == 499
    assert len(counted) == 499


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ConfigurationError, match=r"similarity=1\.2"):
        NearDuplicates(similarity=1.2)
    with pytest.raises(ConfigurationError, match="bands=0"):
        NearDuplicates(bands=0)
