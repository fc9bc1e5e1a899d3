"""What a save needs beside its result: room for one tensor, not for the state of the whole model."""

import pytest
import torch
from lightning.pytorch import LightningModule
from optimizer_runs import make_trainer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_lm.strategies import AtomicCheckpointIO, ShardedOptimizerStrategy, TensorParallelStrategy

WIDTH, NUM_MATRICES = 128, 24
MATRIX = 4 * WIDTH**2
"""Bytes of a matrix, and of each of the two that AdamW keeps for it."""
SLACK = MATRIX // 2
"""Step counts, and what is sent ahead."""
WHOLE = 3 * NUM_MATRICES * MATRIX
FEW = WHOLE // 4
"""The gauge does not see what gloo's own threads let go of, so some tensors that were gathered seem to live on."""


class Wide(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_MATRICES)))

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Gauge:
    """Bytes of tensors that were alive at most, and at the end, beyond those that were there before."""

    def __enter__(self):
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        self.most = self.alive = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            self.alive += event.nbytes()
            self.most = max(self.most, self.alive)


def trained(strategy):
    trainer = make_trainer(strategy, max_steps=1, plugins=[AtomicCheckpointIO()])
    trainer.fit(Wide(), DataLoader([torch.ones(1, WIDTH)], batch_size=None))
    return trainer


def gather_state(min_split_elements):
    trainer = trained(ShardedOptimizerStrategy(min_split_elements=min_split_elements))
    with Gauge() as gauge:
        state = trainer.strategy.optimizer_state(trainer.optimizers[0])
    whole = sum(tensor.nbytes for kept in state.get("state", {}).values() for tensor in kept.values())
    return gauge.most, gauge.alive, whole


@pytest.mark.parametrize("min_split_elements", [1, 10 * WIDTH**2], ids=["rows", "whole parameters"])
def test_the_state_of_an_optimizer_comes_tensor_by_tensor(ranks, min_split_elements):
    (most, alive, whole), (most_elsewhere, alive_elsewhere, _) = ranks(2).run(gather_state, min_split_elements)
    assert 2 * NUM_MATRICES * MATRIX <= whole <= 2 * NUM_MATRICES * MATRIX + SLACK
    assert alive >= NUM_MATRICES * MATRIX - SLACK  # it is the other rank's part at least: the gauge works
    assert most <= alive + 2 * MATRIX + SLACK
    assert most_elsewhere <= MATRIX + SLACK
    assert alive_elsewhere <= SLACK


def save(folders, path):
    trainer = trained(TensorParallelStrategy(1, save_distributed_checkpoint=folders))
    with Gauge() as gauge:
        trainer.save_checkpoint(path)
    return gauge.most, gauge.alive


def test_a_folder_is_written_without_gathering_anything(ranks, tmp_path):
    for most, alive in ranks(2).run(save, True, tmp_path / "folder.ckpt"):
        assert alive <= most <= 4 * MATRIX


def test_a_file_is_gathered_on_the_rank_that_writes_it(ranks, tmp_path):
    (most, alive), (most_elsewhere, alive_elsewhere) = ranks(2).run(save, False, tmp_path / "file.ckpt")
    assert WHOLE <= most <= WHOLE + FEW
    assert max(most_elsewhere, alive, alive_elsewhere) <= FEW
    assert (tmp_path / "file.ckpt").stat().st_size >= WHOLE
