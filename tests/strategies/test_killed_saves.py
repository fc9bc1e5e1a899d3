"""Kills at the worst moments of a save: the newest whole checkpoint is found by its name, and training goes on."""

import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from split_runs import run
from torch import distributed
from workers import WorkerError

from lightning_lm.cli.run_folder import newest_checkpoint
from lightning_lm.strategies import AtomicCheckpointIO, ShardedOptimizerStrategy, TensorParallelStrategy

STEPS, KILLED_AT = 4, 3
MOMENTS = {
    "a rank writes its tensors": (1, "fsync", 1, 2),
    "rank 0 writes what is no tensor": (0, "fsync", 3, 2),
    "all is written, and nothing in its place": (0, "replace", 1, 2),
    "the old one is set aside": (0, "replace", 2, 2),
    "the new one is in its place, the old one aside": (0, "replace", 3, 3),
    "the old one is being removed": (0, "rmdir", 1, 3),
}
"""Which rank dies, before which call of the operating system, and after how many steps it is found again."""


class Killing(ModelCheckpoint):
    """Saves at every step; at one of them it is killed."""

    def __init__(self, folder, moment):
        super().__init__(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        self.moment = moment

    def on_train_batch_end(self, trainer, *args):
        if self.moment is not None and trainer.global_step == KILLED_AT:
            rank, name, count, _ = self.moment
            if rank == distributed.get_rank():
                die_before(name, count)
        super().on_train_batch_end(trainer, *args)


def die_before(name, count):
    """Let this process die before its n-th call of a function from here on."""
    function, calls = getattr(os, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(os, name, counted)


def train(strategy, folder, moment=None, ckpt_path=None, max_steps=STEPS):
    saving = {"callbacks": [Killing(folder, moment)], "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    return run(strategy, steps=STEPS, max_steps=max_steps, ckpt_path=ckpt_path, **saving)[0]


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_kill_while_a_folder_is_saved(ranks, tmp_path, moment):
    with pytest.raises(WorkerError, match=r"died \(exit code -9\)"):
        ranks(2).run(train, TensorParallelStrategy(1), tmp_path, moment)
    found = newest_checkpoint({"callbacks": {"init_args": {"dirpath": tmp_path}}})
    assert AtomicCheckpointIO().load_checkpoint(found)["global_step"] == moment[-1]
    losses = ranks(2).run(train, TensorParallelStrategy(1), tmp_path, None, "last")[0]
    torch.testing.assert_close(losses, run(steps=STEPS)[0][moment[-1] :], rtol=0, atol=1e-9)
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == STEPS
    assert not [path.name for path in tmp_path.iterdir() if path.name != "last.ckpt"]  # what was left behind is gone


@pytest.mark.parametrize(("first", "then"), [("zero1", "fsdp2"), ("fsdp2", "zero1")])
def test_a_file_takes_the_place_of_a_folder_and_a_folder_that_of_a_file(ranks, tmp_path, first, then):
    strategies = {"zero1": ShardedOptimizerStrategy(), "fsdp2": TensorParallelStrategy(1)}
    ranks(2).run(train, strategies[first], tmp_path, max_steps=2)
    losses = ranks(2).run(train, strategies[then], tmp_path, None, "last")[0]
    torch.testing.assert_close(losses, run(steps=STEPS)[0][2:], rtol=0, atol=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").is_dir() is (then == "fsdp2")


def test_a_folder_is_removed_all_at_once(ranks, tmp_path):
    ranks(2).run(train, TensorParallelStrategy(1), tmp_path)
    with pytest.raises(WorkerError, match=r"died \(exit code -9\)"):
        ranks(1).run(remove_and_die, tmp_path / "last.ckpt")
    assert newest_checkpoint({"callbacks": {"init_args": {"dirpath": tmp_path}}}) is None
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    assert not list(left.iterdir())


def remove_and_die(path):
    die_before("rmdir", 1)
    AtomicCheckpointIO().remove_checkpoint(path)
