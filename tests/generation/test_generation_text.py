"""The text of a growing answer against decoding the whole of it, for any text and any stop strings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm.generation.detokenizer import AnswerText


class Bytes:
    """One id per UTF-8 byte."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class Words:
    """Words that carry the space before them, which a text does not show at its start (as SentencePiece has it)."""

    def __init__(self, words):
        self.words = words

    def decode(self, ids):
        return "".join("▁" + self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")


class ByteFallback:
    """Shows each byte of an unfinished character as one U+FFFD, as byte-fallback decoders do."""

    def decode(self, ids):
        text = ""
        run: list[int] = []
        for token in [*ids, None]:
            if token is not None and token < 256:
                run.append(token)
                continue
            try:
                text += bytes(run).decode("utf-8")
            except UnicodeDecodeError:
                text += "�" * len(run)
            run = []
            text += "" if token is None else chr(token - 256)
        return text


def pieces_of(answer: AnswerText, groups) -> list[str]:
    pieces = []
    for group in groups:
        answer.push(group)
        pieces.append(answer.take())
    answer.finish()
    return [*pieces, answer.take()]


def cut_naively(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read on until the text ends in a stop string; return what precedes it, and whether there was one."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="abé漢😀�", max_size=12),
    st.lists(st.text(alphabet="abé漢", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 4), max_size=40),
)
def test_pieces_join_to_the_text_before_the_first_stop_string(text, stops, sizes):
    data = text.encode()
    groups, at = [], 0
    for size in [*sizes, *[1] * len(data)]:
        if at < len(data):
            groups.append(list(data[at : at + size]))
            at += size
    answer = AnswerText(Bytes(), [], stops)
    pieces = pieces_of(answer, groups)
    assert "".join(pieces) == answer.text
    assert (answer.text, answer.stopped) == cut_naively(text, stops)
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=20), st.binary(max_size=12))
def test_any_bytes_join_to_what_decoding_all_gives(prompt, data):
    answer = AnswerText(Bytes(), list(prompt))
    assert "".join(pieces_of(answer, [[b] for b in data])).endswith(data.decode("utf-8", errors="replace").lstrip("�"))


def test_nothing_of_a_stop_string_comes_before_it_is_ruled_out():
    answer = AnswerText(Bytes(), [], ["</end>"])
    assert pieces_of(answer, [[b] for b in b"a</en b</end>c"]) == [
        *["a", "", "", "", "", "</en ", "b"],
        *[""] * 8,
    ]
    assert answer.stopped


def test_a_held_back_begin_is_let_go_at_the_end():
    answer = AnswerText(Bytes(), [], ["</end>"])
    assert pieces_of(answer, [list(b"x</en")]) == ["x", "</en"]
    assert not answer.stopped


def test_spaces_between_words_are_kept_from_the_prompt_on():
    tokenizer = Words(["Hello", "world", "again"])
    assert pieces_of(AnswerText(tokenizer, [0]), [[1], [2], [0]]) == [" world", " again", " Hello", ""]
    assert pieces_of(AnswerText(tokenizer, []), [[1], [2]]) == ["world", " again", ""]


@pytest.mark.parametrize("character", ["é", "漢", "😀"])
def test_unfinished_bytes_are_held_back_from_fallback_decoders_too(character):
    ids = [256 + ord("x"), *character.encode(), 256 + ord("y")]
    pieces = pieces_of(AnswerText(ByteFallback(), [256 + ord("p")]), [[i] for i in ids])
    assert "".join(pieces) == f"x{character}y"
    assert not any("�" in piece for piece in pieces)


def test_half_a_character_at_the_end_shows_as_replacement():
    answer = AnswerText(Bytes(), [])
    assert pieces_of(answer, [[b] for b in "a😀".encode()[:3]]) == ["a", "", "", "�"]


def test_a_character_that_the_prompt_began_belongs_to_the_answer():
    data = "é".encode()
    assert pieces_of(AnswerText(Bytes(), list(b"a" + data[:1])), [[data[1]]]) == ["é", ""]


def test_decoding_work_does_not_grow_with_the_answer():
    lengths = []

    class Counting(Bytes):
        def decode(self, ids):
            lengths.append(len(ids))
            return super().decode(ids)

    pieces_of(AnswerText(Counting(), list(b"prompt" * 100)), [[ord("a")]] * 500)
    assert max(lengths) <= 9
