"""The merge loop against a textbook trainer that counts every pair again after each merge."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from lightning_lm.tokenizers.merges import learn_merges


def textbook_merges(word_counts: dict[bytes, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    words = {word: [bytes([byte]) for byte in word] for word in word_counts}
    merges = []
    while len(merges) < num_merges:
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, tokens in words.items():
            for pair in pairwise(tokens):
                counts[pair] += word_counts[word]
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = {word: apply_merge(tokens, best) for word, tokens in words.items()}
    return merges


def apply_merge(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    index = 0
    while index < len(tokens):
        if tuple(tokens[index : index + 2]) == pair:
            merged.append(tokens[index] + tokens[index + 1])
            index += 2
        else:
            merged.append(tokens[index])
            index += 1
    return merged


def as_bytes(pairs: list[tuple[int, int]]) -> list[tuple[bytes, bytes]]:
    names = [bytes([byte]) for byte in range(256)]
    merges = []
    for left, right in pairs:
        merges.append((names[left], names[right]))
        names.append(names[left] + names[right])
    return merges


@pytest.mark.parametrize(
    "word_counts",
    [
        {b"aaaa": 1},
        {b"aaaaaaaaaaaaaaaaa": 3, b"aaa": 2},
        {b"abab": 1, b"baba": 1, b"ab": 1},
        {b"aab": 2, b"aaab": 1, b"baaa": 5, b"abaab": 1},
        {b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6},
        {"日本語".encode(): 2, "日本".encode(): 2, "😀😀😀".encode(): 1, "é".encode(): 9},
        {bytes([0, 255, 0, 255]): 1, bytes([255, 0]): 1, bytes([0]): 7},
    ],
    ids=["run", "runs", "alternating", "overlaps", "sennrich", "unicode", "extreme bytes"],
)
def test_merges_are_the_textbook_ones(word_counts: dict[bytes, int]) -> None:
    assert as_bytes(learn_merges(word_counts, 40)) == textbook_merges(word_counts, 40)


@pytest.mark.parametrize("seed", range(60))
def test_merges_of_random_words_are_the_textbook_ones(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = rng.choice([b"a", b"ab", b"abc", bytes([0, 255, 97]), bytes(range(256))])
    longest, most = rng.choice([3, 12, 40]), rng.choice([1, 3, 50])
    words = (bytes(rng.choices(alphabet, k=rng.randint(1, longest))) for _ in range(rng.randint(1, 30)))
    word_counts = {word: rng.randint(1, most) for word in words}
    assert as_bytes(learn_merges(word_counts, 60)) == textbook_merges(word_counts, 60)


def test_merges_of_real_text_are_the_textbook_ones() -> None:
    with open(random.__file__, encoding="utf-8") as file:
        word_counts = dict(Counter(word.encode() for word in file.read().split()))
    assert as_bytes(learn_merges(word_counts, 120)) == textbook_merges(word_counts, 120)


def test_ties_go_to_the_greater_pair_of_byte_strings_not_of_ids() -> None:
    # All four pairs occur once. "za" + "b" beats ("z", "c") only if strings are compared, part by part.
    assert as_bytes(learn_merges({b"ab": 1, b"ba": 1, b"b": 5}, 1)) == [(b"b", b"a")]
    merges = as_bytes(learn_merges({b"zab": 2, b"zac": 2, b"yx": 2}, 3))
    assert merges == [(b"z", b"a"), (b"za", b"c"), (b"za", b"b")]


def test_a_prefix_is_smaller_than_what_it_begins() -> None:
    # After the first merge ("ab", "x") and ("a", "x") both occur twice; "ab" is the greater string.
    assert as_bytes(learn_merges({b"ab": 9, b"abx": 2, b"ax": 2}, 2)) == [(b"a", b"b"), (b"ab", b"x")]


def test_nothing_to_merge() -> None:
    assert learn_merges({}, 10) == []
    assert learn_merges({b"a": 5, b"": 2}, 10) == []
    assert learn_merges({b"ab": 5}, 0) == []


def test_counts_beyond_32_bits() -> None:
    assert as_bytes(learn_merges({b"ab": 2**33, b"cd": 2**33 + 1}, 2)) == [(b"c", b"d"), (b"a", b"b")]


def test_progress_is_reported() -> None:
    seen: list[int] = []
    learn_merges({bytes([i, j]): 1 + i * j for i in range(20) for j in range(20)}, 200, on_progress=seen.append)
    assert seen == [64, 128, 192]
