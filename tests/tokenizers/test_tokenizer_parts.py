"""Tokenizers as parts: plain data and back, trained once for the same settings and texts."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from lightning_lm.parts import Part
from lightning_lm.tokenizers import (
    BPETokenizer,
    Bytes,
    ByteTokenizer,
    CharacterTokenizer,
    LoadTokenizer,
    SentencePieceTokenizer,
    TokenizerPart,
    TrainBPE,
    TrainCharacters,
    TrainSentencePiece,
    TrainWords,
    WordTokenizer,
)
from lightning_lm.tokenizers.base import MARKER

TEXTS = ["the cat sat on the mat " * 20, "日本 é"]


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (TrainBPE(vocab_size=270), BPETokenizer),
        (TrainSentencePiece(vocab_size=300), SentencePieceTokenizer),
        (TrainCharacters(), CharacterTokenizer),
        (TrainWords(vocab_size=10), WordTokenizer),
        (Bytes(special_tokens=("<a>", "<b>")), ByteTokenizer),
    ],
)
def test_parts_build_what_they_say(part: TokenizerPart, kind: type, tmp_path: Path) -> None:
    assert Part.from_dict(part.to_dict()) == part
    first = part.build(lambda: TEXTS, tmp_path)
    again = part.build(lambda: iter(TEXTS), tmp_path)
    assert type(first) is type(again) is kind
    assert first.fingerprint == again.fingerprint == part.build(lambda: TEXTS).fingerprint


def test_an_existing_tokenizer(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "t")
    part = LoadTokenizer(path=str(tmp_path / "t"))
    assert part.build(list).fingerprint == ByteTokenizer().fingerprint


class _Counting(TrainBPE):
    trained = 0

    def train(self, texts: Iterable[str]) -> BPETokenizer:
        type(self).trained += 1
        return super().train(texts)


@pytest.fixture
def counting() -> type[_Counting]:
    _Counting.trained = 0
    return _Counting


def test_training_happens_once(counting: type[_Counting], tmp_path: Path) -> None:
    for _ in range(3):
        counting(vocab_size=270).build(lambda: TEXTS, tmp_path)
    assert counting.trained == 1


@pytest.mark.parametrize("other", [["the cat"], ["".join(TEXTS)], TEXTS[::-1], []])
def test_other_texts_are_learned_anew(counting: type[_Counting], tmp_path: Path, other: list[str]) -> None:
    counting(vocab_size=270).build(lambda: TEXTS, tmp_path)
    counting(vocab_size=270).build(lambda: other, tmp_path)
    assert counting.trained == 2


def test_other_settings_are_learned_anew(counting: type[_Counting], tmp_path: Path) -> None:
    sizes = [counting(vocab_size=size).build(lambda: TEXTS, tmp_path).vocab_size for size in (260, 270)]
    assert (sizes, counting.trained) == ([260, 270], 2)


def test_a_damaged_cache_is_made_anew(counting: type[_Counting], tmp_path: Path) -> None:
    first = counting(vocab_size=270).build(lambda: TEXTS, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "tokenizer.json").write_text("{")
    assert counting(vocab_size=270).build(lambda: TEXTS, tmp_path).fingerprint == first.fingerprint
    (folder / MARKER).unlink()
    assert counting(vocab_size=270).build(lambda: TEXTS, tmp_path).fingerprint == first.fingerprint
    counting(vocab_size=270).build(lambda: TEXTS, tmp_path)
    assert counting.trained == 3
