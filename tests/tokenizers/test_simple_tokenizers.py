"""Bytes, characters and words."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm import protocols
from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import (
    GPT2,
    UNKNOWN,
    BaseTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    WordTokenizer,
    load_tokenizer,
    tokenizer_from_files,
)

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)
TEXT = Path(random.__file__).read_text(encoding="utf-8")
TOKENIZERS: list[BaseTokenizer] = [
    ByteTokenizer(),
    CharacterTokenizer.train([TEXT, "日本"]),
    WordTokenizer.train([TEXT], 300),
]
ALL = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)


@ALL
def test_they_are_tokenizers(tokenizer: BaseTokenizer) -> None:
    assert isinstance(tokenizer, protocols.Tokenizer)
    assert tokenizer.eos_id == tokenizer.special_tokens["<|endoftext|>"] == tokenizer.vocab_size - 1
    assert tokenizer.token_byte_lengths()[list(tokenizer.special_tokens.values())].sum() == 0


@ALL
def test_saving_and_loading(tokenizer: BaseTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    for again in (load_tokenizer(tmp_path / "t"), tokenizer_from_files(tokenizer.to_files())):
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(TEXT + "ж") == tokenizer.encode(TEXT + "ж")


@ALL
@EXAMPLES
@given(parts=st.lists(st.text(max_size=8)))
def test_a_stream_has_the_ids_of_the_whole(tokenizer: BaseTokenizer, parts: list[str]) -> None:
    assert list(tokenizer.encode_iterable(parts)) == tokenizer.encode("".join(parts))


@ALL
def test_special_tokens_are_text_unless_allowed(tokenizer: BaseTokenizer) -> None:
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>")
    ids = tokenizer.encode("in<|endoftext|>in", allow_special=True)
    assert ids == [*tokenizer.encode("in"), tokenizer.eos_id, *tokenizer.encode("in")]


@ALL
def test_lone_surrogates_are_refused(tokenizer: BaseTokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode("\udfff")


@EXAMPLES
@given(st.text())
def test_bytes_bring_every_text_back(text: str) -> None:
    tokenizer = TOKENIZERS[0]
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_byte_lengths()[tokenizer.encode(text)].sum() == len(text.encode())


def test_bytes_without_special_tokens() -> None:
    tokenizer = ByteTokenizer(())
    assert (ByteTokenizer().vocab_size, tokenizer.vocab_size) == (257, 256)
    assert tokenizer.eos_id is None
    assert tokenizer.token_byte_lengths().tolist() == [1] * 256


def test_characters() -> None:
    tokenizer = CharacterTokenizer.train(["bca", "aé"])
    assert tokenizer.encode("abcé") == [0, 1, 2, 3]
    assert tokenizer.special_tokens == {UNKNOWN: 4, "<|endoftext|>": 5}
    assert tokenizer.decode(tokenizer.encode("a?b")) == "a\ufffdb"
    assert tokenizer.token_byte_lengths().tolist() == [1, 1, 1, 2, 0, 0]
    assert CharacterTokenizer.train([]).encode("a") == [0]
    with pytest.raises(TokenizerError, match="lone surrogate"):
        CharacterTokenizer.train(["\ud800"])


def test_words_are_the_most_frequent_ones() -> None:
    words = GPT2.split(TEXT)
    tokenizer = TOKENIZERS[2]
    counts = Counter(words)
    kept = sorted(counts, key=lambda word: (-counts[word], word.encode()))[:298]
    known = [tokenizer.decode([i]) for i in range(298)]
    assert known == kept
    expected = [kept.index(word) if word in kept else 298 for word in words]
    assert tokenizer.encode(TEXT) == expected
    assert tokenizer.special_tokens[UNKNOWN] == tokenizer.unk_id == 298


def test_known_words_come_back() -> None:
    tokenizer = WordTokenizer.train(["to be, or not  to be"], 100)
    assert tokenizer.decode(tokenizer.encode("not to, be or  to be")) == "\ufffd to, be or  to be"
    assert tokenizer.decode(tokenizer.encode("to be  to, or not")) == "to be  to, or not"


def test_vocabularies_that_cannot_be() -> None:
    with pytest.raises(TokenizerError, match="use at least 3"):
        WordTokenizer.train(["a"], 2)
    with pytest.raises(TokenizerError, match="leave it out"):
        CharacterTokenizer(["a"], [UNKNOWN])
    with pytest.raises(TokenizerError, match="twice"):
        CharacterTokenizer(["a", "a"])
    with pytest.raises(TokenizerError, match="put it into a list"):
        ByteTokenizer("<s>")
