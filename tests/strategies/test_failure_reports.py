"""What a rank learns of the others when it has waited for them in vain."""

import os
import re
import signal
import time
import types

import pytest
import torch
from torch import distributed

from lightning_lm import strategies
from lightning_lm.strategies.failure_reports import FailureReports, _ReportingStrategy

IN_VAIN = RuntimeError("[gloo/transport] Connection closed by peer")


def board():
    def broadcast(value):
        told = [value]
        distributed.broadcast_object_list(told)
        return told[0]

    return FailureReports(
        types.SimpleNamespace(
            global_rank=distributed.get_rank(),
            world_size=distributed.get_world_size(),
            cluster_environment=types.SimpleNamespace(main_address="127.0.0.1"),
            broadcast=broadcast,
            barrier=distributed.barrier,
        )
    )


def stuck_in_its_own_work():
    distributed.recv(torch.empty(1), 0)


def what_rank_0_learns(kind):
    reports = board()
    rank, learned = distributed.get_rank(), None
    if kind == "is dead":
        reports.close()  # the last rank has no thread that could answer
    elif kind == "raised" and rank == 2:
        reports.tell(ValueError("the last straw"))
    if rank == 1:
        reports.tell(IN_VAIN)
    if rank == 0:
        reports.tell(IN_VAIN)
        learned = reports.others()
        distributed.send(torch.empty(1), 2)
    elif rank == 2:
        stuck_in_its_own_work()
    distributed.barrier()
    reports.close()
    return learned


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("is at work", r"^Rank 2 of 3 has not failed; it is at\n(.|\n)*in stuck_in_its_own_work"),
        ("raised", r"^Rank 2 of 3 failed with\nValueError: the last straw"),
        ("is dead", r"^Rank 2 of 3 does not respond: it has died"),
    ],
)
def test_the_rank_that_the_others_waited_for_is_named(ranks, kind, said):
    (found,), *_ = ranks(3).run(what_rank_0_learns, kind)  # of rank 1, which waited too, nothing is said
    assert re.search(said, found), found


def while_rank_0_is_stopped(error):
    reports = board()
    rank, pids = distributed.get_rank(), [None] * distributed.get_world_size()
    distributed.all_gather_object(pids, os.getpid())
    learned, seconds = None, 0.0
    if rank == 1:
        os.kill(pids[0], signal.SIGSTOP)
        start = time.monotonic()
        learned = reports.report(error)
        seconds = time.monotonic() - start
        os.kill(pids[0], signal.SIGCONT)
    distributed.barrier()
    reports.close()
    return learned, seconds


def test_a_stopped_rank_0_is_named_although_the_board_lies_with_it(ranks):
    _, (found, seconds) = ranks(2).run(while_rank_0_is_stopped, IN_VAIN)
    assert found == ["Rank 0 of 2 does not respond: it has died or is stopped, or its machine cannot be reached."]
    assert seconds < 60
    _, (found, seconds) = ranks(2).run(while_rank_0_is_stopped, ValueError("of its own"))
    assert found == []
    assert seconds < 60


@pytest.mark.parametrize("name", [name for name in strategies.__all__ if name.endswith("Strategy")])
def test_every_strategy_reports(name):
    assert issubclass(getattr(strategies, name), _ReportingStrategy)
