"""N-gram models on text: sums over every token and byte, and names that ARPA files can hold."""

import numpy as np
import pytest

from lightning_lm.errors import DataError
from lightning_lm.evals import evaluate_ngram, ngram
from lightning_lm.evals.ngram import token_words
from lightning_lm.models import fit_ngram
from lightning_lm.tokenizers import BPETokenizer, ByteTokenizer, WordTokenizer

TEXTS = ["to be or not to be", "", "é, that is the question", "x"]


def test_the_score_is_the_sum_over_documents_and_their_ends(monkeypatch):
    tokenizer = ByteTokenizer()
    ids = np.array([*b"to be, to be", 256])
    model = fit_ngram([(ids, np.array([len(ids)]))], order=3, vocab_size=257)
    expected = sum(model.log_probs(np.array([*text.encode(), 256])).sum() for text in TEXTS if text)
    for batch in (1 << 20, 1):
        monkeypatch.setattr(ngram, "_BATCH_CHARACTERS", batch)
        score = evaluate_ngram(model, TEXTS, tokenizer)
        assert score.nll_sum == pytest.approx(-expected, rel=1e-12)
        assert score.num_bytes == len("".join(TEXTS).encode())
        assert score.num_tokens == score.num_bytes + 3
    with pytest.raises(DataError, match="no text"):
        evaluate_ngram(model, [""], tokenizer)
    with pytest.raises(DataError, match="has 256 ids and the n-gram model 257"):
        evaluate_ngram(model, TEXTS, ByteTokenizer([]))


def test_names_are_different_and_have_no_white_space():
    words = token_words(ByteTokenizer())
    assert (words[ord("a")], words[ord(" ")]) == ("a", "Ġ")
    assert words[256] == "</s>"
    assert words[200] == "<id:200>"
    tokenizer = WordTokenizer(["<s>", " the", "</s>", "Ġ", "\u00a0"])
    assert token_words(tokenizer) == ["<id:0>", "Ġthe", "<id:2>", "Äł", "Âł", "<unk>", "</s>"]
    bpe = BPETokenizer.train(["the  cat\n sat <s> on </s> the mat, é é é"] * 20, 300)
    words = token_words(bpe)
    assert len(set(words)) == bpe.vocab_size
    assert all(word.split() == [word] and word != "<s>" for word in words)
