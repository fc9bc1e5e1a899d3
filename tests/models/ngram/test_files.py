"""N-gram models in folders: equal after loading, refused where a byte has changed."""

import json

import numpy as np
import pytest
from ngram_texts import random_documents, text_of

from lightning_lm.errors import CheckpointError
from lightning_lm.models.ngram import fit_ngram, load_ngram, save_ngram


@pytest.fixture
def saved(tmp_path):
    model = fit_ngram([text_of(random_documents(0, 20, [300]))], order=3, vocab_size=20)
    save_ngram(model, tmp_path / "ngram", files={"note.txt": "ä"})
    return model, tmp_path / "ngram"


def test_a_model_is_the_same_after_loading(saved):
    model, folder = saved
    again = load_ngram(folder)
    held_out = text_of(random_documents(1, 20, [50, 2]))
    np.testing.assert_array_equal(again.log_probs(*held_out), model.log_probs(*held_out))
    assert (folder / "note.txt").read_text(encoding="utf-8") == "ä"
    save_ngram(fit_ngram([text_of([[1, 2]])], order=2, vocab_size=20), folder)  # over the older one
    assert load_ngram(folder).order == 2


def test_damage_is_told(saved, monkeypatch):
    _, folder = saved
    path = folder / "log_probs_2.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        load_ngram(folder)
    (folder / "SHA256SUMS").unlink()
    path.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_ngram(folder)
    about = json.loads((folder / "ngram.json").read_text())
    (folder / "ngram.json").write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(CheckpointError, match="format 9"):
        load_ngram(folder)
    with pytest.raises(CheckpointError, match="no n-gram model"):
        load_ngram(folder.parent)
