"""Which merges tiktoken may apply, decided against merge-by-merge encoding of every token's own bytes."""

import random

import pytest
import tiktoken

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers.vocabulary import Merge, Vocabulary


def encode_merge_by_merge(text: bytes, merges: list[Merge]) -> list[bytes]:
    tokens = [text[i : i + 1] for i in range(len(text))]
    for merge in merges:
        merged: list[bytes] = []
        while tokens:
            length = 2 if tuple(tokens[:2]) == merge else 1
            merged.append(b"".join(tokens[:length]))
            tokens = tokens[length:]
        tokens = merged
    return tokens


def random_merges(rng: random.Random) -> list[Merge]:
    tokens = [b"a", b"b", b"c"][: rng.randint(1, 3)]
    merges: list[Merge] = []
    for _ in range(rng.randint(1, 7)):
        merge = (rng.choice(tokens), rng.choice(tokens))
        if merge[0] + merge[1] not in tokens:
            merges.append(merge)
            tokens.append(merge[0] + merge[1])
    return merges


@pytest.mark.parametrize("seed", range(20))
def test_accepted_are_exactly_the_merges_that_make_their_own_tokens(seed: int) -> None:
    rng = random.Random(seed)
    accepted = 0
    for _ in range(50):
        merges = random_merges(rng)
        reachable = all(
            encode_merge_by_merge(left + right, merges[:rank]) == [left, right]
            for rank, (left, right) in enumerate(merges)
        )
        try:
            vocabulary = Vocabulary(merges)
        except TokenizerError:
            assert not reachable, merges
            continue
        assert reachable, merges
        accepted += 1
        check_against_tiktoken(vocabulary, merges, rng)
    assert 5 < accepted < 50


def check_against_tiktoken(vocabulary: Vocabulary, merges: list[Merge], rng: random.Random) -> None:
    encoding = tiktoken.Encoding("t", pat_str=r"[\s\S]+", mergeable_ranks=vocabulary.ranks, special_tokens={})
    for _ in range(10):
        text = "".join(rng.choices("abc", k=rng.randint(1, 14)))
        tokens = encoding.decode_tokens_bytes(encoding.encode_ordinary(text))
        assert tokens == encode_merge_by_merge(text.encode(), merges), (merges, text)


def test_a_merge_that_is_never_reached_is_refused() -> None:
    # "abc" becomes "ab" + "c" first, so a + bc never meet; tiktoken would make the token from "ab" + "c" all the same.
    with pytest.raises(TokenizerError, match=r"Merge 2, b'a' \+ b'bc', is never reached"):
        Vocabulary([(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")])


def test_the_leftmost_of_a_run_goes_first() -> None:
    Vocabulary([(b"a", b"a"), (b"aa", b"a")])
    with pytest.raises(TokenizerError, match="never reached"):
        Vocabulary([(b"a", b"a"), (b"a", b"aa")])


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ([(b"ab", b"c"), (b"a", b"b")], "only later merges make these"),
        ([(b"a", b"b"), (b"a", b"b")], "Two merges make the same token"),
        ([(b"a", b"")], "only later merges make these"),
    ],
)
def test_merges_that_cannot_be(merges: list[Merge], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Vocabulary(merges)


def test_ids_must_name_every_token_once() -> None:
    bytes_ids = {bytes([byte]): byte for byte in range(256)}
    with pytest.raises(TokenizerError, match="1 tokens have no id"):
        Vocabulary([(b"a", b"b")], bytes_ids)
    with pytest.raises(TokenizerError, match="made by no merge"):
        Vocabulary([], bytes_ids | {b"xyz": 256})
    with pytest.raises(TokenizerError, match="same id"):
        Vocabulary([(b"a", b"b")], bytes_ids | {b"ab": 7})


def test_special_tokens_may_not_take_the_place_of_others() -> None:
    vocabulary = Vocabulary([(b"a", b"b")])
    with pytest.raises(TokenizerError, match="has the id 256 of the token b'ab'"):
        vocabulary.table({"<s>": 256})
    with pytest.raises(TokenizerError, match="'ab' is an ordinary token"):
        vocabulary.table({"ab": 300})
    assert vocabulary.table({"<s>": 258})[255:] == [b"\xff", b"ab", b"", b"<s>"]
