"""Split patterns: nothing is lost, the two syntaxes agree, and cutting where it is allowed changes nothing."""

import re

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import GPT2, GPT4, QWEN2, SplitPattern
from lightning_lm.tokenizers.patterns import last_match

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True, database=None)
PATTERNS = pytest.mark.parametrize("pattern", [GPT2, GPT4, QWEN2], ids=["gpt2", "gpt4", "qwen2"])
TRICKY = st.text(st.sampled_from(" \n\r\t\x1c\x85\xa0\u200b\u3000'sSlLxé日本1²½Ⅷ!_-\u0301。😀"), max_size=24)


def tiktoken_split(pattern: SplitPattern, text: str) -> list[str]:
    """Split by tiktoken's engine: every word is a token of its own in a vocabulary of bytes and these words."""
    words = {word.encode() for word in pattern.split(text)}
    tokens = [bytes([byte]) for byte in range(256)] + sorted(word for word in words if len(word) > 1)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("t", pat_str=pattern.complete, mergeable_ranks=ranks, special_tokens={})
    return [token.decode() for token in encoding.decode_tokens_bytes(encoding.encode_ordinary(text))]


def test_gpt2_words() -> None:
    assert GPT2.split("I'll  pay 12345€,\n\n  don't!") == [
        *("I", "'ll", " ", " pay", " 12345", "€,", "\n\n ", " don", "'t", "!"),
    ]


def test_gpt4_words() -> None:
    assert GPT4.split("I'LL  pay 12345€,\n\n  don't!") == [
        *("I", "'LL", " ", " pay", " ", "123", "45", "€,\n\n", " ", " don", "'t", "!"),
    ]


def test_qwen2_words() -> None:
    """The expression is that of Qwen2's tokenizer.json; each digit stands alone."""
    assert QWEN2.expression == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert QWEN2.split("pay 12345€") == ["pay", " ", "1", "2", "3", "4", "5", "€"]


@PATTERNS
@EXAMPLES
@given(text=TRICKY)
def test_joined_words_are_the_text(pattern: SplitPattern, text: str) -> None:
    assert "".join(pattern.split(text)) == text


@PATTERNS
@EXAMPLES
@given(text=st.text(st.characters(max_codepoint=127), max_size=40))
def test_the_ascii_expression_gives_the_same_words(pattern: SplitPattern, text: str) -> None:
    assert pattern.split(text) == SplitPattern(pattern.expression).split(text)


@PATTERNS
@EXAMPLES
@given(text=TRICKY)
def test_a_cut_changes_no_word(pattern: SplitPattern, text: str) -> None:
    for match in re.finditer(pattern.cuts, text):
        left, right = text[: match.start()], text[match.start() :]
        assert pattern.split(left) + pattern.split(right) == pattern.split(text)
        assert tiktoken_split(pattern, left) + tiktoken_split(pattern, right) == tiktoken_split(pattern, text)


@PATTERNS
@EXAMPLES
@given(text=TRICKY, more=TRICKY)
def test_a_cut_stays_a_cut_when_text_follows(pattern: SplitPattern, text: str, more: str) -> None:
    cut = pattern.last_cut(text)
    assert pattern.split(text[:cut]) + pattern.split(text[cut:] + more) == pattern.split(text + more)


def test_what_an_expression_leaves_out_is_kept() -> None:
    pattern = SplitPattern(r"[a-z]+")
    assert pattern.split("ab, c\n1") == ["ab", ",", " ", "c", "\n", "1"]
    assert pattern.last_cut("ab cd ef") == 0


@pytest.mark.parametrize(
    ("expression", "message"), [("(a", "no regular expression"), ("(a)b", "captures"), ("a*", "matches nothing")]
)
def test_expressions_that_cannot_be_used(expression: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        SplitPattern(expression)


def test_names_and_expressions() -> None:
    assert SplitPattern.of("gpt2") is GPT2
    assert SplitPattern.of(GPT4) is GPT4
    assert SplitPattern.of(r"\S+").expression == r"\S+"


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 5000])
def test_last_match_looks_as_far_back_as_needed(length: int) -> None:
    assert last_match("(?<=x)(?=y)", "axy" + "z" * length) == 2
    assert last_match("(?<=x)(?=y)", "z" * length) == 0
