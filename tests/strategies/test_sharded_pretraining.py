"""Our own modules on ranks with sharded optimizers: exact means over target tokens, norms, clipping, metrics."""

import pytest
import torch
from optimizer_runs import SPLIT, make_trainer, weights_of
from torch import distributed

from lightning_lm.datamodules import Loading, TextDataModule
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import AdamW, Constant, Muon, Spike
from lightning_lm.strategies import ShardedOptimizerStrategy
from lightning_lm.tokenizers import Bytes
from lightning_lm.types import IGNORE_INDEX

VOCAB, WIDTH, ROWS, WINDOW = 31, 9, 40, 24
"""A full window of 24 rows and one of 16 that is not full."""
CONFIG = TransformerConfig(
    vocab_size=VOCAB, d_model=24, num_layers=2, layers=Layer(mixer=Attention(num_heads=2)), context_length=32
)


class Ragged:
    """Rows of 0 to 8 targets; the second of two ranks has nothing to learn at first."""

    def __init__(self, micro_batch: int):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(VOCAB, (ROWS, WIDTH), generator=generator)
        self.labels = self.ids.clone()
        kept = torch.randint(0, WIDTH, (ROWS,), generator=generator)
        self.labels[torch.arange(WIDTH) > kept[:, None]] = IGNORE_INDEX
        self.labels[1:6:2] = IGNORE_INDEX
        self.size, self.rank, self.ranks = micro_batch, distributed.get_rank(), distributed.get_world_size()

    def __len__(self):
        return -(-ROWS // self.size)

    def __iter__(self):
        for first in range(0, ROWS, self.size):
            mine = slice(first + self.rank, first + self.size, self.ranks)
            yield {"input_ids": self.ids[mine], "labels": self.labels[mine]}


def strategy_of(stage):
    return ShardedOptimizerStrategy(stage=stage, min_split_elements=SPLIT) if stage else "auto"


def train_on_ragged_rows(stage, accumulate, clip, skip):
    torch.manual_seed(0)
    optimizer = AdamW(lr=1e-3, eps=1e-5)
    module = PretrainModule(CONFIG, optimizer=optimizer, schedule=Constant(), skip=Spike() if skip else None)
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "log_every_n_steps": 1}
    make_trainer(strategy_of(stage), max_epochs=3, **settings).fit(module, Ragged(WINDOW // accumulate))
    return weights_of(module), module.last_metrics


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("clip", "skip"), [(None, False), (0.05, True)])
def test_ragged_rows(ranks, stage, accumulate, clip, skip):
    wanted, metrics = ranks(1).run(train_on_ragged_rows, 0, accumulate, clip, skip)[0]
    for found, found_metrics in ranks(2).run(train_on_ragged_rows, stage, accumulate, clip, skip):
        assert found_metrics["train/tokens"] == metrics["train/tokens"]
        for name in ("train/loss", "train/grad_norm"):
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-5)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def pretrain(stage, folder, optimizer=AdamW(lr=2e-3), accumulate=3, clip=1.0):
    data = TextDataModule(
        folder / "corpus",
        tokenizer=Bytes(),
        context_length=16,
        batch_size=12,
        loading=Loading(cache_dir=str(folder / "cache"), show_progress=False),
    )
    torch.manual_seed(0)
    module = PretrainModule(CONFIG_OF_BYTES, optimizer=optimizer)
    settings = {"max_steps": 12, "accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "max_epochs": -1}
    interval = 12 * accumulate
    make_trainer(strategy_of(stage), val_check_interval=interval, num_sanity_val_steps=0, **settings).fit(module, data)
    return module.last_metrics["val/loss"], weights_of(module)


CONFIG_OF_BYTES = TransformerConfig(d_model=24, num_layers=1, layers=Layer(mixer=Attention(num_heads=2)))


def write_corpus(folder):
    (folder / "corpus").mkdir()
    for number in range(40):
        (folder / "corpus" / f"{number}.txt").write_text(f"document {number}: " + "abc def " * number)


def test_the_main_job_in_small_ends_at_the_same_validation_loss(ranks, tmp_path):
    write_corpus(tmp_path)
    wanted, _ = ranks(1).run(pretrain, 0, tmp_path)[0]
    for stage in (1, 2):
        losses = [loss for loss, _ in ranks(2).run(pretrain, stage, tmp_path)]
        assert losses == pytest.approx([wanted, wanted], rel=1e-5)


@pytest.mark.parametrize(("stage", "clip"), [(1, 1.0), (2, None)])
def test_two_ranks_are_one_that_adds_up_the_same_halves_bit_for_bit(ranks, tmp_path, stage, clip):
    """What sets two ranks apart from one process is the order of sums alone; with stage 2 also that of the norm's."""
    write_corpus(tmp_path)
    loss, weights = ranks(1).run(pretrain, 0, tmp_path, Muon(), 2, clip)[0]
    for found, found_weights in ranks(2).run(pretrain, stage, tmp_path, Muon(), 1, clip):
        assert found == pytest.approx(loss, rel=1e-12)
        assert all(torch.equal(found_weights[name], weight) for name, weight in weights.items())
