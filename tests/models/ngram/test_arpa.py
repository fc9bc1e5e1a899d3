"""ARPA files: read by the letter of the format, written and read again, refused where they are damaged."""

import numpy as np
import pytest
from ngram_texts import random_documents, text_of

from lightning_lm.errors import DataError
from lightning_lm.models.ngram import fit_ngram, read_arpa, write_arpa

SMALL = """
\\data\\
ngram 1=5
ngram 2=2
ngram 3=1

\\1-grams:
-99\t<s>\t-0.5
-0.3\t</s>
-1.2\t<unk>
-0.7\ta\t-0.25
-0.9\tb

\\2-grams:
-0.2\t<s> a\t-0.1
-0.4 a b

\\3-grams:
-0.05\t<s> a b

\\end\\
"""


def test_a_file_is_read_by_the_letter(tmp_path):
    path = tmp_path / "small.arpa"
    path.write_text(SMALL)
    model, words = read_arpa(path)
    assert words == ["</s>", "<unk>", "a", "b"]
    end, unknown, a, b = range(4)
    log10 = [-0.2, -0.05, -0.3, -0.7, -0.25 - 0.7]  # <s> a b </s>: known, known, backed off, then a new start
    found = model.log_probs(np.array([a, b, end]))
    np.testing.assert_allclose(found / np.log(10), log10[:3], atol=1e-12)
    found = model.log_probs(np.array([b, a, a, unknown]))
    np.testing.assert_allclose(found / np.log(10), [-0.5 - 0.9, -0.7, -0.25 - 0.7, -0.25 - 1.2], atol=1e-12)
    model, _ = read_arpa(path, ["b", "other", "a", "</s>"])
    np.testing.assert_allclose(model.log_probs(np.array([1])) / np.log(10), [-0.5 - 1.2], atol=1e-12)


def test_a_model_survives_the_file(tmp_path):
    train, held_out = random_documents(0, 20, [500, 60]), random_documents(1, 22, [90, 4])
    model = fit_ngram([text_of(train)], order=4, vocab_size=22)
    words = [f"w{index}" for index in range(21)] + ["</s>"]
    written = []
    write_arpa(model, tmp_path / "m.arpa", words, advance=written.append)
    again, names = read_arpa(tmp_path / "m.arpa")
    assert names[1:] == words
    assert names[0] == "<unk>"
    assert sum(written) == sum(model.num_ngrams)
    again, _ = read_arpa(tmp_path / "m.arpa", words)
    np.testing.assert_allclose(again.log_probs(*text_of(held_out)), model.log_probs(*text_of(held_out)), atol=3e-7)
    assert again.num_ngrams == model.num_ngrams


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "data", "no line"),
        ("ngram 2=2", "ngram 2=x", "is not 'ngram 2=...'"),
        ("ngram 2=2", "ngram 2=3", "has 2 2-grams and its head states 3"),
        ("\\2-grams:", "\\3-grams:", "line 14.*is not"),
        ("-0.4 a b", "-0.4 b b b b", "line 16.*no 2-gram"),
        ("-0.4 a b", "0.4 a b", "no 2-gram"),
        ("-0.4 a b", "-0.4 a c", "'c' is none of its words"),
        ("-0.4 a b", "-0.4 <s> a", "listed twice"),
        ("-0.05\t<s> a b", "-0.05\tb a b", "prefix that is not listed"),
        ("\\end\\", "", "is not"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, old, new, message):
    path = tmp_path / "bad.arpa"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(DataError, match=message):
        read_arpa(path)


def test_names_that_cannot_stand_in_a_file_are_refused(tmp_path):
    model = fit_ngram([text_of([[0, 1]])], order=2, vocab_size=2)
    for words in (["a b", "c"], ["<s>", "c"], ["", "c"]):
        with pytest.raises(DataError, match="cannot be a word"):
            write_arpa(model, tmp_path / "m.arpa", words)
    for words in (["a", "a"], ["a"]):
        with pytest.raises(DataError, match="different name"):
            write_arpa(model, tmp_path / "m.arpa", words)
    assert not list(tmp_path.iterdir())
