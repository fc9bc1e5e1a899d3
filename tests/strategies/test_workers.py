"""The pool of ranks itself: what works, and that nothing that goes wrong stays silent or takes for ever."""

import os
import signal
import threading
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.utils.data import DataLoader
from workers import WorkerError, hang


class Settings:
    """Stands for whatever classes a test defines for itself."""

    def __init__(self, scale):
        self.scale = scale


def add_up(settings, *, offset):
    total = torch.tensor(float(distributed.get_rank() + 1))
    distributed.all_reduce(total)
    return distributed.get_rank(), total * settings.scale + offset


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_work_together_and_answer_in_order(ranks, size):
    found = ranks(size).run(add_up, Settings(10), offset=1)
    assert [rank for rank, _ in found] == list(range(size))
    assert all(total == 10 * size * (size + 1) / 2 + 1 for _, total in found)


def call_what_is_deprecated(category):
    exec(
        "import warnings; warnings.warn('old', category)", {"__name__": "lightning_lm.callbacks", "category": category}
    )


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_deprecated_calls_of_ours_are_errors_on_ranks_too(ranks, category):
    with pytest.raises(WorkerError, match=f"raised {category.__name__}: old"):
        ranks(1).run(call_what_is_deprecated, category)


def process_id():
    os.environ["LEFT_BEHIND"] = "1"
    return os.getpid()


def has_left_behind():
    return os.getpid(), "LEFT_BEHIND" in os.environ, torch.rand(1).item()


def test_ranks_live_on_but_forget(ranks):
    ids = ranks(2).run(process_id)
    assert os.getpid() not in ids
    found = ranks(2).run(has_left_behind)
    number = torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
    assert found == [(process, False, number) for process in ids]


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder):
    trainer = Trainer(
        accelerator="cpu",
        devices=distributed.get_world_size(),
        strategy=DDPStrategy(),
        max_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Line()
    before = module.layer.weight.item()
    trainer.fit(module, DataLoader([torch.tensor([trainer.global_rank + 1.0])]))
    return trainer.world_size, before - module.layer.weight.item()


def test_a_trainer_uses_the_group_that_is_there(ranks, tmp_path):
    for world_size, moved in ranks(2).run(fit, tmp_path):
        assert world_size == 2
        assert moved == pytest.approx(0.1 * (1 + 2) / 2)


def raise_on(number):
    if distributed.get_rank() == number:
        raise ValueError("the last straw")
    distributed.barrier()


def die_on(number):
    if distributed.get_rank() == number:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def stuck_in_an_endless_loop(number):
    while distributed.get_rank() == number:
        threading.Event().wait(60)
    distributed.barrier()


def stuck_and_says_so(number):
    if distributed.get_rank() == number:
        hang()
    distributed.barrier()


def test_a_rank_that_raises(ranks):
    with pytest.raises(WorkerError, match=r"^rank 1 of 2 raised ValueError: the last straw") as caught:
        ranks(2).run(raise_on, 1)
    assert "in raise_on" in str(caught.value)  # its traceback
    assert "rank 0 of 2 was still at work" in str(caught.value)


def test_a_rank_that_dies(ranks):
    with pytest.raises(WorkerError, match=r"^rank 1 of 2 died \(exit code -9\)"):
        ranks(2).run(die_on, 1)


@pytest.mark.parametrize(("stuck", "timeout_s"), [(stuck_in_an_endless_loop, 4.0), (stuck_and_says_so, 300.0)])
def test_a_rank_that_hangs(ranks, stuck, timeout_s):
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 of 2 hung") as caught:
        ranks(2).run(stuck, 1, timeout_s=timeout_s)
    assert f"in {stuck.__name__}" in str(caught.value).partition("rank 1 of 2 hung")[2]
    assert time.monotonic() - start < 200


@pytest.mark.parametrize("failure", [raise_on, die_on])
def test_new_ranks_take_over_after_a_failure(ranks, failure):
    with pytest.raises(WorkerError):
        ranks(2).run(failure, 0)
    assert len(ranks(2).run(add_up, Settings(1), offset=0)) == 2


def test_what_cannot_be_sent_back_is_an_error_and_no_hang(ranks):
    with pytest.raises(WorkerError, match=r"rank 0 of 1 raised"):
        ranks(1).run(make_a_generator)


def make_a_generator():
    return (number for number in range(3))
