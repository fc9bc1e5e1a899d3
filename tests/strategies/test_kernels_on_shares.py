"""Our operators on DTensors: each rank works on its share, and together they get what one process gets."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_lm import kernels
from lightning_lm.functional.rope import rope_frequencies, rope_table
from lightning_lm.kernels.swap.swap import restore, swap

X = (4, 6, 8)
HEADS, KV_HEADS = (4, 6, 4, 8), (4, 6, 2, 8)
TABLES = rope_table(rope_frequencies(8), 6)
FIRST = torch.tensor([[0, 0, 0, 3, 3, 3]] * 3 + [[0, 1, 2, 3, 4, 5]])
CASES = {
    "rms_norm": (kernels.rms_norm, X, (8,)),
    "rms_norm_residual": (lambda x, r, w: kernels.rms_norm(x, w, residual=r), X, X, (8,)),
    "layer_norm": (kernels.layer_norm, X, (8,), (8,)),
    "softmax": (kernels.softmax, X),
    "swiglu": (kernels.swiglu, X, X),
    "relu_squared": (kernels.relu_squared, X),
    "rope": (kernels.rope, HEADS, KV_HEADS, TABLES[0], TABLES[1]),
    "rope_norms": (
        lambda q, k, c, s, a, b: kernels.rope(q, k, c, s, gains=(a, b)),
        HEADS,
        KV_HEADS,
        *TABLES,
        (8,),
        (8,),
    ),
    "flash_attention": (
        lambda q, k, v, first: kernels.flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), first=first),
        HEADS,
        KV_HEADS,
        KV_HEADS,
        FIRST,
    ),
}


def gradients(function, inputs):
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    weights = [torch.linspace(-1, 1, result.numel()).view(result.shape) for result in results]
    weights = [
        distribute_tensor(weight, result.device_mesh, [Replicate()]) if isinstance(result, DTensor) else weight
        for weight, result in zip(weights, results, strict=True)
    ]
    total = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    found = torch.autograd.grad(total, [one for one in inputs if one.requires_grad])
    return [one.full_tensor() if isinstance(one, DTensor) else one for one in (*results, *found)]


def compared(name):
    """Return the largest difference on shares, and where results were, for each axis that is cut."""
    function, *made = CASES[name]
    inputs = [torch.randn(one).requires_grad_() if isinstance(one, tuple) else one for one in made]
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    expected, answer = gradients(function, inputs), {}
    for axis in range(3):
        placed = [Shard(axis) if one.ndim > 2 and one.shape[:2] == X[:2] else Replicate() for one in inputs]
        shares = [
            distribute_tensor(one.detach(), mesh, [where]).requires_grad_(one.requires_grad)
            for one, where in zip(inputs, placed, strict=True)
        ]
        first = function(*shares)
        first = first[0] if isinstance(first, tuple) else first
        found = gradients(function, shares)
        worst = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        answer[axis] = (worst, str(first.placements[0]))
    return answer


@pytest.mark.parametrize("name", CASES)
def test_shares_of_the_batch_of_the_sequence_and_of_the_last_axis(ranks, name):
    for answer in ranks(2).run(compared, name):
        assert max(worst for worst, _ in answer.values()) < 2e-6
        # Results stay on the ranks that have the rows; what needs whole rows is gathered, and still right.
        assert answer[0][1] == "S(0)"
        if name != "flash_attention":
            assert answer[1][1] == "S(1)"


class Gated(nn.Module):
    """Somebody's feed-forward layer."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Somebody's layer, parallelised by torch's own plans."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.last = nn.RMSNorm(16, eps=1e-6), Gated(), nn.LayerNorm(16)

    def forward(self, x):
        return self.last(x + self.mlp(self.norm(x)))


PLAN = {
    "norm": SequenceParallel(),
    "mlp.gate_proj": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    "mlp.up_proj": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    "last": SequenceParallel(),
}


def trained():
    """Return the parameters after a few steps: plain, exchanged and shared, and what was exchanged."""
    torch.manual_seed(0)
    plain = Block()
    shared = copy.deepcopy(plain)
    done = swap(shared)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    parallelize_module(shared, mesh, PLAN)
    parallelize_module(
        shared,
        mesh,
        PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False),
    )
    x = torch.randn(2, 6, 16)
    for model in (plain, shared):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = (
                model(x).square().mean(-1).sum() if model is plain else model(x).square().mean(-1).sum().full_tensor()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    restore(done)
    pairs = zip(plain.parameters(), shared.parameters(), strict=True)
    worst = max((b.detach().full_tensor() - a.detach()).abs().max().item() for a, b in pairs)
    return worst, sorted(entry.kernel for entry in done if entry.kernel)


def test_exchanged_layers_train_alike_under_tensor_and_sequence_parallelism(ranks):
    for worst, exchanged in ranks(2).run(trained):
        assert worst < 1e-5
        assert exchanged == ["layer_norm", "rms_norm", "swiglu"]
