"""Holding out documents."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm.data import Texts, hold_out
from lightning_lm.errors import ConfigurationError, DataError


def sides(texts, fraction):
    return [list(side.documents()) for side in hold_out(Texts(texts=texts), fraction)]


@given(texts=st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=40), fraction=st.floats(0.01, 0.99))
@settings(max_examples=80, deadline=None)
def test_every_document_is_on_one_side_and_copies_on_the_same(texts, fraction):
    if len(set(texts)) == 1:
        return
    train, validation = sides(texts, fraction)
    assert train
    assert validation
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)


def test_the_share_is_held_and_documents_stay_on_their_side_when_others_come():
    texts = [f"document {k}" for k in range(5000)]
    _, validation = sides(texts, 0.1)
    assert 400 < len(validation) < 600
    _, with_more = sides([f"new {k}" for k in range(1000)] + texts, 0.1)
    assert [text for text in with_more if not text.startswith("new")] == validation


def test_a_single_document_is_cut_at_a_line_break():
    text = "".join(f"line {k}\n" for k in range(100))
    train, validation = sides([text], 0.1)
    assert train[0] + validation[0] == text
    assert validation[0].startswith("line")
    assert 0.08 < len(validation[0]) / len(text) < 0.12
    assert sides(["ab"], 0.05) == [["a"], ["b"]]


def test_too_little_text_says_what_to_do():
    with pytest.raises(DataError, match="validation=0"):
        sides(["a"], 0.05)
    with pytest.raises(DataError, match="empty"):
        sides([], 0.05)


def test_fingerprints_tell_sides_and_shares_apart():
    source = Texts(texts=["a", "b"])
    found = {side.fingerprint for fraction in (0.1, 0.2) for side in hold_out(source, fraction)}
    assert len(found | {source.fingerprint}) == 5
    assert hold_out(Texts(texts=iter("ab")), 0.1)[0].fingerprint is None


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2])
def test_a_share_outside_0_and_1_is_refused(fraction):
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        hold_out(Texts(texts=["a"]), fraction)
