"""Ranks for the tests of strategies."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from split_runs import save_run
from workers import Workers


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Workers]]:
    """Return a function that gives 1 to 4 ranks, made when they are first asked for: ``ranks(2).run(f, *args)``."""
    pools: dict[int, Workers] = {}

    def of(size: int) -> Workers:
        assert 1 <= size <= 4
        return pools.setdefault(size, Workers(size))

    yield of
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def saved(ranks: Callable[[int], Workers], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a checkpoint that two ranks wrote."""
    path = tmp_path_factory.mktemp("saved") / "last.ckpt"
    ranks(2).run(save_run, "fsdp2", path)
    return path
