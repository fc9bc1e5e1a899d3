"""Files read in blocks, and texts regrouped without cutting anything."""

import random
from pathlib import Path

import pytest

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import GPT4
from lightning_lm.tokenizers.streams import avoiding_special, read_text, rejoin


def cut_at_random(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("seed", range(30))
def test_chunks_have_the_words_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(" \n'sx1!é", k=300))
    chunks = list(rejoin(cut_at_random(text, rng), GPT4.last_cut, size=rng.choice([1, 5, 50])))
    assert "".join(chunks) == text
    assert [word for chunk in chunks for word in GPT4.split(chunk)] == GPT4.split(text)


@pytest.mark.parametrize("seed", range(60))
def test_special_tokens_are_never_cut(seed: int) -> None:
    rng = random.Random(seed)
    special = ["<a b>", "<a b> <c>", "<", "x x"]  # with spaces in them, and one the beginning of another
    longest_first = avoiding_special(GPT4.last_cut, special)
    text = "".join(rng.choices([*special, " ", "x", "<a", " b>", "y"], k=40))
    chunks = list(rejoin(cut_at_random(text, rng), longest_first, size=rng.choice([1, 4, 16])))
    assert "".join(chunks) == text
    assert [part for chunk in chunks for part in split_special(chunk, special)] == split_special(text, special)


def split_special(text: str, special: list[str]) -> list[str]:
    """Return the special tokens of a text and the words between, found one character at a time."""
    parts: list[str] = []
    plain = ""
    while text:
        token = max((token for token in special if text.startswith(token)), key=len, default="")
        if token:
            parts += [*GPT4.split(plain), f"special {token}"]
            plain = ""
        plain += "" if token else text[0]
        text = text[len(token) or 1 :]
    return parts + GPT4.split(plain)


def test_memory_is_bounded_by_the_chunk() -> None:
    largest = max(map(len, rejoin(("word " for _ in range(20_000)), GPT4.last_cut, size=1000)))
    assert largest < 1100


def test_a_text_that_cannot_be_cut_comes_whole() -> None:
    assert list(rejoin(["a"] * 5000, GPT4.last_cut, size=10)) == ["a" * 5000]
    assert list(rejoin([], GPT4.last_cut)) == []


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 1000])
def test_files_are_read_whatever_the_blocks(tmp_path: Path, block_bytes: int) -> None:
    text = "a\r\nb\n日本 😀\rend"
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert "".join(read_text(tmp_path / "text", block_bytes=block_bytes)) == text


@pytest.mark.parametrize("content", [b"ab\xff\xfecd", "日本".encode()[:-1]])
def test_a_file_that_is_not_utf8_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "binary.dat").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"binary\.dat is not UTF-8"):
        list(read_text(tmp_path / "binary.dat"))
