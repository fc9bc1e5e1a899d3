"""Layouts of documents in rows, by lengths alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm.data.packing import BestFit, Concatenate, OnePerRow

PACKINGS = [BestFit(), Concatenate(), OnePerRow()]
ids = [type(packing).__name__ for packing in PACKINGS]


def padding(plan, row_length):
    cells = np.add.reduceat(plan.lengths + 1, plan.row_starts[:-1])
    assert cells.max() <= row_length
    return 1 - cells.sum() / (plan.num_rows * row_length)


@pytest.mark.parametrize("packing", PACKINGS, ids=ids)
@given(lengths=st.lists(st.integers(0, 40), max_size=60), row_length=st.integers(2, 20))
@settings(max_examples=80, deadline=None)
def test_every_target_is_in_exactly_one_fragment_and_rows_hold_what_they_are_given(packing, lengths, row_length):
    plan = packing.plan(np.array(lengths, dtype=np.int64), row_length)
    seen = [
        (document, offset + k)
        for document, offset, length in zip(plan.documents, plan.offsets, plan.lengths, strict=True)
        for k in range(length)
    ]
    assert sorted(seen) == [(document, k) for document, length in enumerate(lengths) for k in range(length)]
    assert (plan.lengths > 0).all()
    assert plan.row_starts[0] == 0
    assert plan.row_starts[-1] == len(plan.lengths)
    assert (np.diff(plan.row_starts) > 0).all()
    if plan.num_rows:
        padding(plan, row_length)


@pytest.mark.parametrize("packing", PACKINGS, ids=ids)
@given(lengths=st.lists(st.integers(0, 40), max_size=40), row_length=st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_long_documents_are_truncated_or_dropped_when_asked(packing, lengths, row_length):
    given_lengths = np.array(lengths, dtype=np.int64)
    for long, wanted in (
        ("truncate", np.minimum(given_lengths, row_length - 1)),
        ("drop", np.where(given_lengths < row_length, given_lengths, 0)),
    ):
        plan = type(packing)(long=long).plan(given_lengths, row_length)
        found = np.bincount(plan.documents, plan.lengths, len(lengths)).astype(np.int64) if len(lengths) else wanted
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("row_length", [257, 1025, 2049])
@pytest.mark.parametrize("shape", ["short", "web", "code", "just over half"])
def test_best_fit_wastes_less_than_half_a_percent(shape, row_length):
    random = np.random.default_rng(0)
    lengths = {
        "short": random.poisson(30, 50_000) + 1,
        "web": random.lognormal(6, 1, 20_000).astype(np.int64) + 1,
        "code": random.lognormal(7.6, 1.4, 5_000).astype(np.int64) + 1,
        "just over half": np.full(5_000, int(0.55 * row_length)),
    }[shape]
    plan = BestFit().plan(lengths, row_length)
    assert plan.lengths.sum() == lengths.sum()
    assert padding(plan, row_length) < 0.005


def test_best_fit_cuts_few_documents():
    """Concatenation cuts about one document a row; best fit cuts one where nothing fits."""
    lengths = np.random.default_rng(0).lognormal(5, 0.5, 20_000).astype(np.int64) + 1
    cuts = {type(p): len(p.plan(lengths, 2049).lengths) - len(lengths) for p in (BestFit(), Concatenate())}
    assert cuts[BestFit] < 0.2 * cuts[Concatenate]


def test_one_document_of_ten_million_tokens():
    for packing in PACKINGS:
        plan = packing.plan(np.array([10_000_000]), 257)
        assert plan.num_rows == -(-10_000_000 // 256)
        assert plan.lengths.sum() == 10_000_000
