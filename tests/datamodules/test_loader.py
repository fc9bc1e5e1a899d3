"""Who reads which rows."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_lm.data import Texts, TokenStream, tokenize
from lightning_lm.datamodules.loader import DataShard, Loading, TrainLoader, ValidationLoader
from lightning_lm.errors import ConfigurationError
from lightning_lm.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def stream(texts, tmp_path_factory):
    store = tokenize(Texts(texts=texts), ByteTokenizer(), tmp_path_factory.mktemp("s") / "store", show_progress=False)
    return TokenStream(store, row_length=33)


def steps(stream, batch_size, num_ranks, micro_batches, *, position=0, workers=0):
    """Return, step by step, the sorted rows that all ranks read together."""
    ranks = []
    for rank in range(num_ranks):
        shard = DataShard(batch_size, num_ranks, rank, micro_batches)
        loader = TrainLoader(stream, shard, lambda: position, Loading(num_workers=workers))
        ranks.append([batch["input_ids"].tolist() for batch in loader])
        assert len(ranks[-1]) == len(loader)
    read = [[row for rank in ranks for row in rank[k]] for k in range(len(ranks[0]))]
    return [
        sorted(itertools.chain.from_iterable(read[k : k + micro_batches])) for k in range(0, len(read), micro_batches)
    ]


@pytest.mark.parametrize(
    ("num_ranks", "micro_batches", "workers"), [(2, 1, 0), (1, 4, 0), (2, 2, 0), (4, 2, 0), (1, 2, 2)]
)
def test_each_step_reads_the_same_rows_however_it_is_shared(stream, num_ranks, micro_batches, workers):
    alone = steps(stream, 8, 1, 1)
    assert steps(stream, 8, num_ranks, micro_batches, workers=workers) == alone
    assert sorted(itertools.chain.from_iterable(alone)) == sorted(
        stream.batch(np.arange(8 * len(alone)))["input_ids"].tolist()
    )
    assert 8 * len(alone) >= stream.rows_per_epoch > 8 * (len(alone) - 1)


def test_a_position_is_a_number_of_rows_whatever_the_batch_size(stream):
    later = steps(stream, 4, 1, 1, position=12)
    assert later[0] == sorted(stream.batch(np.arange(12, 16))["input_ids"].tolist())


def test_workers_leave_the_global_random_state_alone(stream):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(TrainLoader(stream, DataShard(8), lambda: 0, Loading(num_workers=1))))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_validation_counts_each_token_once_and_ranks_have_equally_many_batches(stream, num_ranks):
    loaders = [
        ValidationLoader(stream, DataShard(num_ranks * 4, num_ranks, rank), Loading()) for rank in range(num_ranks)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [batch for loader in loaders for batch in loader]
    assert {batch["labels"].shape for batch in batches} == {(4, 33)}
    found = torch.cat([batch["labels"].flatten() for batch in batches])
    wanted = stream.batch(np.arange(stream.rows_per_epoch))["labels"].ravel()
    assert torch.bincount(found[found >= 0]).tolist() == np.bincount(wanted[wanted >= 0]).tolist()
    assert len(found[found >= 0]) == stream.num_targets


@pytest.mark.parametrize(("batch_size", "num_ranks", "micro_batches"), [(8, 3, 1), (8, 2, 8), (1, 2, 1)])
def test_rows_that_cannot_be_shared_equally_are_refused(batch_size, num_ranks, micro_batches):
    with pytest.raises(ConfigurationError, match=f"multiple of {num_ranks * micro_batches}"):
        DataShard(batch_size, num_ranks, 0, micro_batches)


def test_a_strategy_that_does_not_say_who_reads_what_is_refused():
    trainer = SimpleNamespace(
        distributed_sampler_kwargs=None, world_size=2, strategy=object(), accumulate_grad_batches=1
    )
    with pytest.raises(ConfigurationError, match="all would train on all rows"):
        DataShard.of(trainer, 8)
    trainer.world_size = 1
    assert DataShard.of(trainer, 8) == DataShard(8)
