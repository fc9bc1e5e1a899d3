"""``lightning-lm demo ladder``: every model on the same text, in one table and one figure."""

import json

import pytest

from lightning_lm.cli import ladder, main
from lightning_lm.datamodules import TextDataModule
from lightning_lm.evals import evaluate_ngram
from lightning_lm.models import fit_ngram
from lightning_lm.tokenizers import TrainBPE


def test_every_model_is_measured_on_the_same_text(tmp_path, monkeypatch, capsys):
    for name, value in (("_VOCAB_SIZE", 270), ("_D_MODEL", 16), ("_CONTEXT", 16), ("_BATCH", 2), ("_ORDER", 3)):
        monkeypatch.setattr(ladder, name, value)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(30):
        (corpus / f"{index}.txt").write_text(f"document {index}: " + "the cat sat on the mat. " * (index + 1))
    words = ["--output", str(tmp_path / "out"), "--input", str(corpus), "--steps", "2"]
    assert main(["demo", "ladder", *words]) == 0
    rungs = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert {rung["name"].split()[0] for rung in rungs} == {
        "3-gram", "feed-forward", "RNN", "LSTM", "GRU", "Transformer"
    }  # fmt: skip
    assert [rung["bits_per_byte"] for rung in rungs] == sorted(rung["bits_per_byte"] for rung in rungs)
    assert {rung["tokens"] for rung in rungs if "gram" not in rung["name"]} == {2 * 2 * 16}
    assert (tmp_path / "out" / "ladder.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert all(f"{rung['bits_per_byte']:.3f}" in shown for rung in rungs)

    data = TextDataModule(corpus, tokenizer=TrainBPE(vocab_size=270), context_length=16, batch_size=2)
    data.prepare_data()
    parts = list(data.train_documents())
    score = evaluate_ngram(fit_ngram(parts, order=3, vocab_size=270), data.validation_texts(), data.tokenizer)
    (ngram,) = (rung for rung in rungs if "gram" in rung["name"])
    assert ngram["bits_per_byte"] == pytest.approx(score.bits_per_byte)
    assert ngram["tokens"] == sum(len(tokens) for tokens, _ in parts)
