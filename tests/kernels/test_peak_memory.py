"""What the allocator saw while losses worked: nobody needs to know which tensors hold logits, or their shape."""

import json
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from lightning_lm import kernels

ROWS, SIZE, VOCAB = 4096, 16, 2000
BUDGET = 2**20
"""Bytes: a thirtieth of the logits in float32."""
TARGETS = torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(0))


def naive(hidden, weight):
    return F.cross_entropy((hidden @ weight.T).float(), TARGETS, reduction="sum")


def fused(hidden, weight, budget=BUDGET):
    return kernels.linear_cross_entropy(hidden, weight, TARGETS, budget_bytes=budget).loss_sum


def scored(hidden, weight, budget=BUDGET):
    return kernels.linear_logprob(hidden, weight, TARGETS, budget_bytes=budget).logprobs.sum()


def judged(hidden, weight, budget=BUDGET):
    return kernels.linear_nll(hidden, weight, TARGETS, budget_bytes=budget).sum()


def peak_bytes(loss_of, dtype, path):
    """Return the most bytes that were allocated at once, beyond what was there, in a forward and a backward pass."""
    hidden, weight = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((ROWS, SIZE), (VOCAB, SIZE)))
    loss_of(hidden, weight)  # what is made once and kept is no part of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = loss_of(hidden, weight)
        if loss.requires_grad:
            torch.autograd.grad(0.5 * loss, (hidden, weight))
    profiler.export_chrome_trace(str(path))
    events = (event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]")
    changes = (event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"]))
    return max(accumulate(changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_of", [fused, scored, judged])
def test_losses_hold_no_more_than_their_budget_beside_their_gradients(loss_of, dtype, tmp_path):
    gradients = 4 * (ROWS + VOCAB) * SIZE  # in float32; a twentieth of the logits, with the budget
    assert peak_bytes(loss_of, dtype, tmp_path / "trace.json") <= BUDGET + gradients


@pytest.mark.parametrize("loss_of", [fused, scored, judged])
def test_it_is_the_budget_that_decides(loss_of, tmp_path):
    generous = peak_bytes(partial(loss_of, budget=16 * BUDGET), torch.float32, tmp_path / "trace.json")
    assert 3 * BUDGET < generous <= 17 * BUDGET


def test_the_meter_sees_logits_that_are_all_there_at_once(tmp_path):
    assert peak_bytes(naive, torch.float32, tmp_path / "trace.json") >= 2 * 4 * ROWS * VOCAB  # and their gradient
