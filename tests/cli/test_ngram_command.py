"""``lightning-lm ngram``: fit, measure, sample and write, as a user types it."""

import gzip
import re

import numpy as np
import pytest

from lightning_lm.cli import main
from lightning_lm.data import hold_out
from lightning_lm.data.sources import Files
from lightning_lm.evals import evaluate_ngram
from lightning_lm.models import load_ngram, read_arpa
from lightning_lm.tokenizers import BPETokenizer, load_tokenizer


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.txt").write_text(f"document {index}: " + "the cat sat on the mat. " * (index + 1))
    return folder


def call(*words):
    return main(["ngram", *map(str, words)])


def test_a_model_is_fitted_on_the_train_side_and_measured_on_the_other(corpus, tmp_path, capsys):
    output = tmp_path / "model"
    assert call("--input", corpus, "--order", 4, "--output", output, "--hold-out", 0.2) == 0
    shown = capsys.readouterr().out
    train, held_out = hold_out(Files(path=str(corpus)), 0.2)
    texts = list(held_out.documents())
    model, tokenizer = load_ngram(output), load_tokenizer(output)
    score = evaluate_ngram(model, texts, tokenizer)
    assert model.order == 4
    assert f"in {40 - len(texts)} documents" in shown
    assert f"{score.bits_per_byte:.4f} bits per byte" in shown
    data = "".join(texts).encode()
    assert re.search(rf"gzip -9 +{8 * len(gzip.compress(data, 9)) / len(data):.3f}", shown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "model"]
    train_ids = [np.append(ids, 256) for ids in tokenizer.encode_batch(list(train.documents()))]
    known = model.log_probs(np.concatenate(train_ids), np.cumsum([len(ids) for ids in train_ids]))
    assert -known.mean() < score.nll_sum / score.num_tokens

    assert call("--model", output, "--input", corpus / "3.txt", "--sample", 40, "--prompt", "the cat") == 0
    shown = capsys.readouterr().out
    assert "Measured on 1 documents" in shown
    assert "\nthe cat" in shown


def test_words_and_an_arpa_file(corpus, tmp_path, capsys):
    words = ("--tokenizer", "words", "--vocab-size", 12, "--arpa", tmp_path / "m.arpa", "--order", 2)
    assert call("--input", corpus, "--output", tmp_path / "w", *words, "--sample", 3) == 0
    model, names = read_arpa(tmp_path / "m.arpa")
    assert {"Ġcat", "<unk>", "</s>"} <= set(names)
    saved = load_ngram(tmp_path / "w")
    np.testing.assert_allclose(model.next_log_probs([]), saved.next_log_probs([]), atol=1e-6)
    assert "ARPA file: " in capsys.readouterr().out


def test_any_tokenizer_serves(corpus, tmp_path, capsys):
    bpe = BPETokenizer.train(["the cat sat on the mat. "] * 3, 270)
    bpe.save(tmp_path / "bpe")
    assert call("--input", corpus, "--output", tmp_path / "m", "--tokenizer", tmp_path / "bpe", "--hold-out", 0) == 0
    assert load_ngram(tmp_path / "m").vocab_size == bpe.vocab_size
    assert "Measured" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--input", "corpus"], 2, "needs --input and --output"),
        (["--output", "out"], 2, "needs --input and --output"),
        (["--output", "out", "--model", "m", "--input", "corpus"], 2, "needs --input and --output"),
        (["--model", "missing"], 1, "There is no n-gram model at missing"),
        (["--input", "corpus", "--output", "corpus"], 1, "corpus is not empty"),
        (["--input", "corpus", "--output", "corpus/0.txt"], 1, "is a file"),
        (["--input", "missing", "--output", "out"], 1, "no file or folder"),
    ],
)
def test_what_is_wrong_is_said(corpus, tmp_path, monkeypatch, capsys, words, status, message):
    monkeypatch.chdir(tmp_path)
    assert call(*words) == status
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]
