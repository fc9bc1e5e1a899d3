"""Counting words: the same in one process and in several, from memory and from files, however it is batched."""

import itertools
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import GPT2, GPT4, word_count_process, word_counts
from lightning_lm.tokenizers.word_counts import count_words

END = "<|endoftext|>"


def plain_counts(documents: list[str]) -> dict[bytes, int]:
    return dict(Counter(word.encode() for text in documents for part in text.split(END) for word in GPT4.split(part)))


@pytest.fixture
def documents() -> list[str]:
    rng = random.Random(0)
    words = ["the", " cat", " 日本", "\n", "12345", " ", END, "'s", "!?", "é"]
    return ["".join(rng.choices(words, k=rng.randint(0, 400))) for _ in range(200)]


@pytest.mark.parametrize("batch", [10, 1000, 1 << 19])
def test_batches_change_nothing(documents: list[str], monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(word_counts, "_BATCH_CHARACTERS", batch)
    assert count_words(documents, GPT4, special_tokens=[END], num_workers=1) == plain_counts(documents)


def test_processes_change_nothing(documents: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(word_counts, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(word_counts, "_WORTH_PROCESSES", 4000)
    file = tmp_path / "corpus.txt"
    file.write_bytes(END.join(documents).encode())
    progress: list[int] = []
    counted = count_words([file, *documents], GPT4, special_tokens=[END], num_workers=3, on_progress=progress.append)
    once = plain_counts(documents)
    assert counted == {word: 2 * count for word, count in once.items()}
    assert sum(progress) == len(file.read_text(encoding="utf-8")) + sum(map(len, documents))


def peak_memory(num_texts: int) -> int:
    tracemalloc.start()
    count_words(itertools.repeat("the same few words again and again\n" * 30, num_texts), GPT2, num_workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_counts, "_BATCH_CHARACTERS", 10_000)
    monkeypatch.setattr(word_counts, "_WORTH_PROCESSES", 20_000)
    assert peak_memory(800) < 1.2 * peak_memory(100)


def test_a_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(word_count_process, "__file__", str(broken))
    monkeypatch.setattr(word_counts, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(word_counts, "_BATCH_CHARACTERS", 1)
    with pytest.raises(TokenizerError, match="ended early"):
        count_words(["some text"] * 10, GPT2, num_workers=2)


def test_an_error_of_the_texts_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_counts, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(word_counts, "_BATCH_CHARACTERS", 1)

    def failing() -> object:
        yield "some text"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        count_words(failing(), GPT2, num_workers=2)


def test_special_tokens_split_and_are_not_counted() -> None:
    assert count_words(["ab<|x|>ab <|x|>", "<|x|>"], GPT2, special_tokens=["<|x|>"]) == {b"ab": 2, b" ": 1}
    assert count_words(["a<s><s>>b"], GPT2, special_tokens=["<s>", "<s>>"]) == {b"a": 1, b"b": 1}


def test_nothing_to_count() -> None:
    assert count_words([], GPT2) == {}
    assert count_words(["", ""], GPT2, special_tokens=[END]) == {}


def test_one_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(TokenizerError, match="put it into a list"):
        count_words("text", GPT2)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800"):
        count_words(["a\ud800"], GPT2)
