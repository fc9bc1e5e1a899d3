"""The n-gram model against the formulas written with dictionaries, one probability at a time."""

import collections

import numpy as np
import pytest
from ngram_texts import random_documents, text_of

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.models.ngram import Workspace, counts, fit_ngram
from lightning_lm.models.ngram.kneser_ney import discounts

START = -1


class Naive:
    """Interpolated modified Kneser-Ney, as Chen & Goodman (1998) write it."""

    def __init__(self, documents, order, vocab_size):
        self.order, self.vocab_size = order, vocab_size
        grams = {n: collections.Counter() for n in range(1, order + 1)}
        for document in documents:
            padded = [START, *document]
            for n in grams:
                for end in range(n, len(padded) + 1):
                    grams[n][tuple(padded[end - n : end])] += 1
        self.counts = {order: grams[order]}
        for n in range(1, order):
            before = collections.Counter(gram[1:] for gram in grams[n + 1])
            self.counts[n] = {g: c if g[0] == START else before[g] for g, c in grams[n].items()}
        self.counts[1] = {g: c for g, c in self.counts[1].items() if g != (START,)}
        self.discounts = {n: self.discount(n) for n in self.counts}
        self.after = {n: collections.defaultdict(dict) for n in self.counts}
        for n, table in self.counts.items():
            for gram, count in table.items():
                self.after[n][gram[:-1]][gram[-1]] = count

    def discount(self, n):
        n1, n2, n3, n4 = (sum(c == size for c in self.counts[n].values()) for size in (1, 2, 3, 4))
        if 0 not in (n1, n2, n3, n4):
            y = n1 / (n1 + 2 * n2)
            found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            if min(found) > 0:
                return found
        return (0.75, 0.75, 0.75)

    def probability(self, context, word):
        lower = self.probability(context[1:], word) if context else 1 / self.vocab_size
        n = len(context) + 1
        seen = self.after[n].get(tuple(context), {})
        if not seen:
            return lower
        taken = {w: self.discounts[n][min(c, 3) - 1] for w, c in seen.items()}
        total = sum(seen.values())
        own = (seen[word] - taken[word]) / total if word in seen else 0.0
        return own + sum(taken.values()) / total * lower

    def log_probs(self, document):
        padded = [START, *document]
        contexts = [padded[max(0, end - self.order + 1) : end] for end in range(1, len(padded))]
        return [np.log(self.probability(c, w)) for c, w in zip(contexts, document, strict=True)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_formulas(order):
    train = random_documents(0, 12, [400, 1, 250, 3, 2])
    held_out = [*random_documents(1, 14, [60, 1, 5]), [13, 12, 13, 0]]  # 12 and 13 are never seen
    naive = Naive(train, order, 14)
    model = fit_ngram([text_of(train)], order=order, vocab_size=14)
    for documents in (train, held_out):
        expected = np.concatenate([naive.log_probs(document) for document in documents])
        np.testing.assert_allclose(model.log_probs(*text_of(documents)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("context", [[], [0], [3, 1], [0, 0, 0, 0], [13], [2, 13, 1], [1, 0, 2, 1, 0, 0, 3]])
def test_next_probabilities_sum_to_one_and_are_those_of_the_text(context):
    train = random_documents(2, 12, [700, 40, 2])
    model = fit_ngram([text_of(train)], order=4, vocab_size=14)
    logs = model.next_log_probs(context)
    assert np.exp(logs).sum() == pytest.approx(1.0, abs=1e-14)
    assert np.isfinite(logs).all()
    each = [model.log_probs(np.array([*context, word]))[-1] for word in range(14)]
    np.testing.assert_allclose(logs, each, rtol=0, atol=1e-13)


def test_documents_do_not_see_each_other():
    train = random_documents(3, 8, [300, 100])
    model = fit_ngram([text_of(train)], order=4, vocab_size=8)
    held_out = random_documents(4, 8, [30, 1, 20])
    alone = np.concatenate([model.log_probs(*text_of([document])) for document in held_out])
    np.testing.assert_array_equal(model.log_probs(*text_of(held_out)), alone)
    parts = [text_of(train[:1]), text_of(train[1:])]  # two stores
    split = fit_ngram(parts, order=4, vocab_size=8)
    np.testing.assert_array_equal(split.log_probs(*text_of(held_out)), model.log_probs(*text_of(held_out)))


def test_a_corpus_larger_than_the_buffer_is_counted_on_disk(tmp_path, monkeypatch):
    train, held_out = random_documents(5, 50, [900, 700, 5, 1, 400]), random_documents(6, 50, [200, 3])
    in_memory = fit_ngram([text_of(train)], order=4, vocab_size=50)
    for module in ("codes", "counts", "kneser_ney", "model"):
        monkeypatch.setattr(f"lightning_lm.models.ngram.{module}.CHUNK", 64)
    runs = []
    merged = counts._merged
    monkeypatch.setattr(counts, "_merged", lambda found, block: runs.append(len(found)) or merged(found, block))
    symbols = []
    model = fit_ngram(
        [text_of(train)], order=4, vocab_size=50, workspace=Workspace(tmp_path, buffer=100), advance=symbols.append
    )
    assert max(runs) > 3
    assert sum(symbols) == 4 * (sum(map(len, train)) + len(train))
    assert isinstance(model.tables[3].log_probs, np.memmap)
    assert model.num_ngrams == in_memory.num_ngrams
    np.testing.assert_allclose(
        model.log_probs(*text_of(held_out)), in_memory.log_probs(*text_of(held_out)), rtol=0, atol=1e-13
    )


def test_discounts_of_chen_and_goodman_and_where_they_are_undefined():
    table = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 12, 5])
    y = 100 / 180
    np.testing.assert_allclose(
        discounts(table), [0, 1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.6], rtol=0, atol=1e-15
    )
    np.testing.assert_array_equal(discounts(np.array([1, 1, 2, 3])), [0, 0.75, 0.75, 0.75])
    np.testing.assert_array_equal(discounts(np.repeat([1, 2, 3, 4], [9, 1, 9, 50])), [0, 0.75, 0.75, 0.75])


def test_a_text_of_one_token_and_a_large_vocabulary():
    model = fit_ngram([text_of([[65_000]])], order=6, vocab_size=65_536)
    assert np.exp(model.next_log_probs([])).sum() == pytest.approx(1.0, abs=1e-9)
    assert model.next_log_probs([]).argmax() == 65_000
    assert np.isfinite(model.log_probs(np.array([0, 65_535, 65_000]))).all()


def test_samples_follow_the_model_and_the_seed():
    text = np.frombuffer(b"abcabcabcabc" * 40 + b"\x00", np.uint8)
    model = fit_ngram([(text, np.array([len(text)]))], order=4, vocab_size=256)
    assert bytes(model.sample(b"ab", max_tokens=7, seed=0, temperature=0.0)) == b"cabcabc"
    assert model.sample(b"a", max_tokens=50, seed=1) == model.sample(b"a", max_tokens=50, seed=1)
    assert model.sample(b"a", max_tokens=50, seed=1) != model.sample(b"a", max_tokens=50, seed=2)
    end = model.sample(b"a", max_tokens=50, seed=3, eos_id=ord("b"))
    assert end == list(b"b") or end[-1] == ord("b")


def test_input_that_cannot_be_used_is_refused():
    with pytest.raises(DataError, match="no text"):
        fit_ngram([], order=3, vocab_size=5)
    with pytest.raises(DataError, match="Token id 7 does not fit vocab_size=5"):
        fit_ngram([text_of([[1, 7]])], order=3, vocab_size=5)
    with pytest.raises(ConfigurationError, match="order=0"):
        fit_ngram([text_of([[1]])], order=0, vocab_size=5)
    model = fit_ngram([text_of([[1, 2]])], order=2, vocab_size=5)
    with pytest.raises(DataError, match="range"):
        model.log_probs(np.array([5]))
    with pytest.raises(ConfigurationError, match="temperature=-1"):
        model.sample([], max_tokens=1, seed=0, temperature=-1.0)
