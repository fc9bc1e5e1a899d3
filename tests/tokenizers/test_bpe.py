"""Byte-pair encoding: ids against merge-by-merge application, round trips, special tokens, streams, bad input."""

import pickle
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm import protocols
from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import BPETokenizer, SplitPattern, bpe

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True, database=None)
END = "<|endoftext|>"
GPT2_EXPRESSION = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def corpus() -> list[str]:
    return [Path(module).read_text(encoding="utf-8") for module in (random.__file__, regex.__file__)] + [
        "日本語 日本語 é é é aaaaaaaaaaaaaaaa" * 20
    ]


CORPUS = corpus()
TOKENIZER = BPETokenizer.train(CORPUS, 700, pattern="gpt2", special_tokens=[END, "<|pad|>"], show_progress=False)


def encode_merge_by_merge(text: str, merges: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    tokens: list[bytes] = []
    for word in regex.findall(GPT2_EXPRESSION, text):
        parts = [bytes([byte]) for byte in word.encode()]
        for merge in merges:
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == merge:
                    parts[place : place + 2] = [merge[0] + merge[1]]
                place += 1
        tokens += parts
    return tokens


def test_it_is_a_tokenizer() -> None:
    assert isinstance(TOKENIZER, protocols.Tokenizer)
    assert TOKENIZER.vocab_size == 700
    assert TOKENIZER.special_tokens == {END: 698, "<|pad|>": 699}
    assert TOKENIZER.eos_id == 698


@pytest.mark.parametrize(
    "text", ["", "a", " ", "aaaaaaa", CORPUS[0][:3000], CORPUS[2][:200], "naïve\u0301 café'LL\r\n\r\n x"]
)
def test_ids_are_those_of_the_merges_in_order(text: str) -> None:
    names = [bytes([byte]) for byte in range(256)] + [left + right for left, right in TOKENIZER.merges]
    assert [names[i] for i in TOKENIZER.encode(text)] == encode_merge_by_merge(text, TOKENIZER.merges)


@EXAMPLES
@given(st.text(st.sampled_from("aeth \n'1日é😀\u0301\x00"), max_size=30))
def test_ids_of_any_text_are_those_of_the_merges_in_order(text: str) -> None:
    names = [bytes([byte]) for byte in range(256)] + [left + right for left, right in TOKENIZER.merges]
    assert [names[i] for i in TOKENIZER.encode(text)] == encode_merge_by_merge(text, TOKENIZER.merges)


@EXAMPLES
@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, allow_special=True)) == text


def test_lone_surrogates_are_refused_with_the_remedy() -> None:
    text = "good \ud83d bad"
    for encode in (TOKENIZER.encode, lambda text: TOKENIZER.encode_batch([text])):
        with pytest.raises(TokenizerError, match=r"U\+D83D, at character 5.*Repair the text first"):
            encode(text)
    repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert TOKENIZER.decode(TOKENIZER.encode(repaired)) == "good \ufffd bad"


def test_special_tokens_are_text_unless_allowed() -> None:
    text = f"a{END} b<|pad|>{END}"
    assert 698 not in TOKENIZER.encode(text)
    ids = TOKENIZER.encode(text, allow_special=True)
    assert ids == [*TOKENIZER.encode("a"), 698, *TOKENIZER.encode(" b"), 699, 698]
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_are_never_merged() -> None:
    tokenizer = BPETokenizer.train([f"x{END}x{END}" * 50], 256 + 20 + 1)
    assert len(tokenizer.merges) == 0  # nothing but single letters is left between them
    assert b"<|" not in b"".join(left + right for left, right in TOKENIZER.merges)


def test_the_longest_special_token_wins() -> None:
    tokenizer = BPETokenizer([], special_tokens=["<s>", "<s><s>"])
    assert tokenizer.encode("<s><s><s>", allow_special=True) == [257, 256]


def test_batches() -> None:
    texts = ["", "hello", CORPUS[0]]
    arrays = TOKENIZER.encode_batch(texts)
    assert [array.tolist() for array in arrays] == [TOKENIZER.encode(text) for text in texts]
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_has_the_ids_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(["the", " self", "\n", "  ", "é", "'s", END, "1"], k=300))
    places = sorted(rng.choices(range(len(text)), k=rng.randint(0, 40)))
    parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert list(TOKENIZER.encode_iterable(parts)) == TOKENIZER.encode(text)
    allowed = TOKENIZER.encode(text, allow_special=True)
    assert list(TOKENIZER.encode_iterable(parts, allow_special=True)) == allowed


def test_a_stream_is_encoded_as_it_comes() -> None:
    seen: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(100_000):
            seen.append(number)
            yield "some words "

    next(TOKENIZER.encode_iterable(texts()))
    assert len(seen) < 10_000


def test_token_byte_lengths_add_up_to_the_text() -> None:
    lengths = TOKENIZER.token_byte_lengths()
    assert lengths.shape == (700,)
    assert lengths.dtype == np.int64
    assert lengths[[698, 699]].tolist() == [0, 0]
    for text in CORPUS:
        assert lengths[TOKENIZER.encode(text)].sum() == len(text.encode())
    assert TOKENIZER.bytes_per_token(CORPUS[0]) == len(CORPUS[0]) / len(TOKENIZER.encode(CORPUS[0]))
    assert TOKENIZER.bytes_per_token("") == 0


def test_decoding_ids_of_any_kind() -> None:
    ids = TOKENIZER.encode("hello")
    assert (
        TOKENIZER.decode(np.array(ids)) == TOKENIZER.decode(torch.tensor(ids)) == TOKENIZER.decode(iter(ids)) == "hello"
    )
    assert TOKENIZER.decode([0xE6, 0x97]) == "\ufffd"


@pytest.mark.parametrize("wrong", [-100, -1, 700])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    with pytest.raises(TokenizerError, match=f"Token id {wrong} is not in the vocabulary, whose ids are 0 to 699"):
        TOKENIZER.decode([5, wrong])


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
@pytest.mark.parametrize("blank", [" ", "\n", " \t"])
def test_white_space_that_overruns_the_stack_of_tiktoken(pattern: str, blank: str) -> None:
    tokenizer = BPETokenizer.train(CORPUS, 300, pattern=pattern, show_progress=False)
    text = "a" + blank * 600_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_long_white_space_has_the_same_ids_on_both_paths(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BPETokenizer.train(CORPUS, 400, pattern=pattern, show_progress=False)
    text = CORPUS[0] + " " * 3000 + CORPUS[1]
    usual = tokenizer.encode(text)
    monkeypatch.setattr(bpe, "_LONG_BLANK", 1000)
    assert bpe._has_long_blank(text)
    assert tokenizer.encode(text) == usual


def test_an_own_pattern() -> None:
    tokenizer = BPETokenizer.train(["ab,ab,ab;ab"], 256 + 10, pattern=r"[a-z]+", special_tokens=[])
    assert tokenizer.merges == [(b"a", b"b")]
    assert tokenizer.encode("ab,ab") == [256, ord(","), 256]
    assert tokenizer.eos_id is None


def test_files_and_texts_train_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(CORPUS[0], encoding="utf-8")
    from_file = BPETokenizer.train([tmp_path / "a.txt"], 400, show_progress=False)
    assert from_file.merges == BPETokenizer.train([CORPUS[0]], 400, show_progress=False).merges


def test_the_order_of_texts_does_not_matter() -> None:
    assert BPETokenizer.train(CORPUS[::-1], 500).merges == BPETokenizer.train(CORPUS, 500).merges


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["aa"]])
def test_tiny_corpora_give_what_there_is(texts: list[str]) -> None:
    tokenizer = BPETokenizer.train(texts, 1000)
    assert tokenizer.vocab_size == 257 + (texts == ["aa"])
    assert tokenizer.decode(tokenizer.encode("é aa")) == "é aa"


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(
        TokenizerError, match=r"vocab_size=257 is too small: 256 bytes and 2 special tokens need at least 258"
    ):
        BPETokenizer.train(["a"], 257, special_tokens=["<a>", "<b>"])
    assert BPETokenizer.train(["aaa"], 257).vocab_size == 257


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (["<a>", "<a>"], "twice"),
        ([""], "empty string"),
        ("<a>", "put it into a list"),
        (["a"], "an ordinary token too"),
    ],
)
def test_special_tokens_that_cannot_be(special: Sequence[str], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        BPETokenizer.train(["text"], 300, special_tokens=special)


def test_an_end_token_must_be_special() -> None:
    with pytest.raises(TokenizerError, match="none of the special tokens"):
        BPETokenizer([], eos_token="<s>")
    assert BPETokenizer([], special_tokens=["<a>", "<b>"]).eos_id is None
    assert BPETokenizer([], special_tokens=["<a>", "<b>"], eos_token="<b>").eos_id == 257


def test_it_can_be_sent_to_other_processes() -> None:
    TOKENIZER.encode("built")
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.encode(CORPUS[0]) == TOKENIZER.encode(CORPUS[0])
    assert copy.fingerprint == TOKENIZER.fingerprint


def test_fingerprints_tell_tokenizers_apart() -> None:
    variants = [
        BPETokenizer([(b"a", b"b")]),
        BPETokenizer([(b"a", b"c")]),
        BPETokenizer([(b"a", b"b")], pattern="gpt2"),
        BPETokenizer([(b"a", b"b")], special_tokens=["<s>"]),
        BPETokenizer([(b"a", b"b")], pattern=SplitPattern("[a-z]+")),
    ]
    assert len({tokenizer.fingerprint for tokenizer in variants}) == len(variants)
    assert variants[0].fingerprint == BPETokenizer([(b"a", b"b")]).fingerprint


def test_the_bar_is_drawn_on_stderr_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    BPETokenizer.train(CORPUS, 400, show_progress=True)
    shown = capsys.readouterr()
    assert "MB/s" in shown.err
    assert "Learning merges" in shown.err
    BPETokenizer.train(CORPUS, 400)
    assert shown.out == "".join(capsys.readouterr()) == ""
