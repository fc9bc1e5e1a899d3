"""Causal convolutions, against torch's own and the direct sum; documents are those alone, tails hand over."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lm.functional.convolution import long_convolution, short_convolution

LENGTHS = [1, 2, 7, 1, 4]
IDS = torch.tensor([0, 1, 0, 1, 0]).repeat_interleave(torch.tensor(LENGTHS))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight[:, None], bias, groups=len(weight)).mT


def direct(x: Tensor, filters: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for lag in range(t + 1):
            out[:, t] += filters[lag] * x[:, t - lag]
    return out


def test_short_is_that_of_torch() -> None:
    x, weight, bias = draw(2, 9, 3), draw(3, 4, seed=1), draw(3, seed=2)
    found, tail = short_convolution(x, weight, bias)
    torch.testing.assert_close(found, of_torch(x, weight, bias), rtol=0, atol=1e-12)
    assert torch.equal(tail, x[:, -3:])


def test_short_of_documents() -> None:
    x, weight, bias = draw(1, len(IDS), 3), draw(3, 4, seed=1), draw(3, seed=2)
    wanted = torch.cat([of_torch(part, weight, bias) for part in x.split(LENGTHS, 1)], 1)
    found, tail = short_convolution(x, weight, bias, document_ids=IDS[None])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert torch.equal(tail, x[:, -3:])
    _, tail = short_convolution(x[:, :-3], weight, bias, document_ids=IDS[None, :-3])  # one token of the last one
    assert torch.equal(tail, torch.cat((torch.zeros(1, 2, 3), x[:, -4:-3]), 1))


def test_short_in_pieces() -> None:
    x, weight = draw(2, 9, 3), draw(3, 4, seed=1)
    whole, _ = short_convolution(x, weight)
    tail, parts = None, []
    for part in x.split([1, 2, 6], 1):
        out, tail = short_convolution(part, weight, tail=tail)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_long_is_the_direct_sum() -> None:
    x, filters = draw(2, 33, 3), draw(40, 3, seed=1)
    torch.testing.assert_close(long_convolution(x, filters), direct(x, filters), rtol=0, atol=1e-9)


def test_long_of_documents() -> None:
    x, filters = draw(2, len(IDS), 3).requires_grad_(), draw(40, 3, seed=1)
    ids = torch.stack([IDS, torch.zeros_like(IDS)])
    wanted = torch.cat(
        [torch.cat([direct(part, filters) for part in x[:1].split(LENGTHS, 1)], 1), direct(x[1:], filters)]
    )
    found = long_convolution(x, filters, document_ids=ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    (right,) = torch.autograd.grad(wanted.square().sum(), x, retain_graph=True)
    (got,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(got, right, rtol=0, atol=1e-9)


def test_long_in_half_precision() -> None:
    x, filters = draw(1, 20, 2).bfloat16(), draw(20, 2, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = long_convolution(x, filters.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), direct(x.double(), filters), rtol=0.05, atol=0.1)
