"""Stores whose every token is unlike all others, so that a row shows where each of its tokens came from."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lightning_lm.data import TokenStore
from lightning_lm.data.store import write_shards

MakeStore = Callable[..., TokenStore]


@pytest.fixture
def numbered_store(tmp_path: Path) -> MakeStore:
    """Return a function that writes documents of given lengths: token k of the corpus is k + 1, and 0 ends a text."""
    count = iter(range(1_000_000))

    def make(lengths: Sequence[int], *, with_eos: bool = True) -> TokenStore:
        total = sum(lengths)
        path = tmp_path / f"store-{next(count)}"
        meta = {
            "dtype": "uint32",
            "vocab_size": total + 1,
            "eos_id": 0 if with_eos else None,
            "num_bytes": total,
            "tokenizer": "numbers",
            "source": "lengths",
        }
        write_shards(path, [(np.arange(1, total + 1, dtype=np.uint32), np.array(lengths, dtype=np.int64))], meta)
        return TokenStore(path)

    return make
