"""A rank that fails in the middle of a run: an error in bounded time that names it, and no file that is not whole."""

import os
import signal

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from optimizer_runs import Run, TinyModule, Windows, make_trainer
from torch import distributed
from workers import WorkerError, hang

from lightning_lm.strategies import AtomicCheckpointIO, ShardedOptimizerStrategy

FAILS_AT = 3
RUN = Run("adamw")


class Failure(Callback):
    """What happens to the last rank at one step."""

    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == FAILS_AT and trainer.global_rank == trainer.world_size - 1:
            if self.kind == "raises":
                raise ValueError("the last straw")
            if self.kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "hangs":
                wait_for_ever()


def wait_for_ever():
    hang()


def train(stage, kind, folder):
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        ShardedOptimizerStrategy(stage=stage),
        callbacks=[saving, Failure(kind)],
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(TinyModule(RUN), Windows(RUN))


def go_on(stage, path):
    trainer = make_trainer(ShardedOptimizerStrategy(stage=stage), plugins=[AtomicCheckpointIO()])
    trainer.fit(TinyModule(RUN), Windows(RUN), ckpt_path=path)
    return trainer.global_step, distributed.get_world_size()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("raises", r"rank 1 of 2 raised ValueError: the last straw(.|\n)*in on_train_batch_start"),
        ("dies", r"^rank 1 of 2 died \(exit code -9\)"),
        ("hangs", r"rank 1 of 2 hung(.|\n)*in wait_for_ever"),
    ],
)
def test_a_rank_that_fails(ranks, tmp_path, stage, kind, said):
    with pytest.raises(WorkerError, match=said):
        ranks(2).run(train, stage, kind, tmp_path / "run")
    saved = sorted((tmp_path / "run").iterdir())
    assert [path.name for path in saved if path.suffix == ".ckpt"] == [f"step={step}.ckpt" for step in (1, 2, 3)]
    for path in saved:  # what is not whole is not called a checkpoint
        assert path.suffix == ".tmp" or AtomicCheckpointIO().load_checkpoint(path)["optimizer_states"]
    assert ranks(2).run(go_on, stage, tmp_path / "run" / "step=3.ckpt") == [(RUN.windows, 2)] * 2


def test_an_error_says_on_which_rank_it_was(ranks, tmp_path):
    with pytest.raises(WorkerError, match=r"the last straw(.|\n)*This was rank 1 of 2, after 3 steps"):
        ranks(2).run(train, 1, "raises", tmp_path)
