"""A shuffle that is computed, not stored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm.data.permutation import key_of, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(size=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
@settings(max_examples=50, deadline=None)
def test_one_entry_alone_is_the_same_as_among_others(size, key, data):
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8)), dtype=np.int64)
    together = permute(indices, size, key)
    assert together.min() >= 0
    assert together.max() < size
    assert [int(permute(indices[k : k + 1], size, key)[0]) for k in range(len(indices))] == together.tolist()


def test_small_permutations_are_all_reached():
    seen = {tuple(permute(np.arange(3), 3, key_of("small", k)).tolist()) for k in range(400)}
    assert len(seen) == 6


@pytest.mark.parametrize("size", [1000, 4096])
def test_looks_like_a_random_order(size):
    """Over many keys each index lands in each tenth equally often: chi-square with 99 degrees, 1e-6 quantile 185."""
    keys = 200
    tenths = np.zeros((10, 10))
    for k in range(keys):
        places = permute(np.arange(size), size, key_of("random", k))
        tenths += np.histogram2d(np.arange(size), places, bins=10)[0]
    expected = keys * size / 100
    assert float(((tenths - expected) ** 2 / expected).sum()) < 185
    neighbours = np.corrcoef(places[:-1], places[1:])[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(size)


def test_keys_depend_on_every_part():
    assert len({key_of(1, "rows", 2), key_of(1, "rows", 3), key_of(1, "windows", 2), key_of(2, "rows", 2)}) == 4
