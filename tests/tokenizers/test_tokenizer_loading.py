"""Opening tokenizers, and writing them so that a half-written one is never taken for a whole one."""

import json
from pathlib import Path

import pytest

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    PretrainedTokenizer,
    load_tokenizer,
    tokenizer_from_files,
)
from lightning_lm.tokenizers.base import MARKER

BPE = BPETokenizer([(b"a", b"b")])


def test_the_kind_is_found(tmp_path: Path) -> None:
    BPE.save(tmp_path / "bpe")
    assert isinstance(load_tokenizer(tmp_path / "bpe"), BPETokenizer)
    assert isinstance(load_tokenizer(str(tmp_path / "bpe" / "tokenizer.json")), BPETokenizer)
    (tmp_path / "bpe" / MARKER).unlink()
    assert isinstance(load_tokenizer(tmp_path / "bpe"), PretrainedTokenizer)
    (tmp_path / "bpe" / "tokenizer.json").rename(tmp_path / "other.json")
    assert isinstance(load_tokenizer(tmp_path / "other.json"), PretrainedTokenizer)
    BPE.save_gpt2_files(tmp_path / "gpt2")
    loaded = load_tokenizer(tmp_path / "gpt2")
    assert isinstance(loaded, BPETokenizer)
    assert (loaded.merges, loaded.eos_id) == (BPE.merges, BPE.eos_id)


def test_saving_over_another_kind(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    PretrainedTokenizer(BPE.to_files()["tokenizer.json"]).save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), PretrainedTokenizer)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_saved_files_are_what_to_files_says(tmp_path: Path) -> None:
    BPE.save(tmp_path / "t")
    found = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "t").iterdir()}
    assert {name: found[name] for name in found if name != "SHA256SUMS"} == BPE.to_files()
    BPE.save_gpt2_files(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").fingerprint == BPE.fingerprint  # beside the others


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_bytes

    def full_disk(path: Path, data: bytes) -> int:
        if path.name == MARKER:
            raise OSError(28, "No space left on device")
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        BPE.save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ByteTokenizer().save(tmp_path / "t")
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        BPE.save(tmp_path / "t")
    assert isinstance(load_tokenizer(tmp_path / "t"), ByteTokenizer)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "No tokenizer here"),
        ({MARKER: "{"}, "missing or damaged"),
        ({MARKER: "[]"}, "missing or damaged"),
        ({MARKER: json.dumps({"format": 99, "kind": "ByteTokenizer"})}, "format 99; this version reads 1"),
        ({MARKER: json.dumps({"format": 1, "kind": "os.system"})}, "names the kind 'os.system'"),
        ({MARKER: json.dumps({"format": 1, "kind": "BPETokenizer"})}, r"tokenizer\.json is missing"),
        ({MARKER: json.dumps({"format": 1, "kind": "SentencePieceTokenizer", "eos_token": None})}, "model is missing"),
        ({MARKER: ByteTokenizer().to_files()[MARKER].replace("Byte", "Character")}, r"entries\.json is missing"),
        ({"tokenizer_config.json": "{}"}, "No tokenizer here"),
    ],
)
def test_damaged_or_foreign_files_are_refused(files: dict[str, str], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_files(files)


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"There is no tokenizer at .*nowhere \(looked from"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
