"""Sums on the ranks that need them, and pieces on all: straight from rank to rank, and by collectives."""

import pytest
import torch
from torch import distributed

from lightning_lm.strategies.zero import communication
from lightning_lm.strategies.zero.partition import Placed, place

SHAPES = [(6, 5), (7, 3), (12, 70_000), (1,), ()]
"""Rows that divide evenly and rows that do not, what travels by itself, and what is smallest."""


def tensors_of(rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def placements():
    placed = [Placed(shape, True) for shape in SHAPES]
    return place(placed, distributed.get_world_size(), min_split_elements=10)


def by(way, patch):
    patch.setattr(communication, "_goes_straight", lambda tensor: way == "straight")


def rows_added_up(way):
    with pytest.MonkeyPatch.context() as patch:
        by(way, patch)
        found = []
        for tag, (tensor, placement) in enumerate(zip(tensors_of(distributed.get_rank()), placements(), strict=True)):
            turned = tensor.mT.contiguous().mT if tensor.dim() == 2 else tensor  # not contiguous
            totals = [transfer.arrive() for transfer in communication.reduce_rows(turned, placement, tag=tag)]
            found.append(next((total for total in totals if total is not None), None))
    return found


@pytest.mark.parametrize("way", ["straight", "collectives"])
@pytest.mark.parametrize("size", [2, 3])
def test_rows_are_added_up_where_they_belong(ranks, way, size):
    found = ranks(size).run(rows_added_up, way)
    for index, shape in enumerate(SHAPES):
        total = sum(tensors_of(rank, torch.float64)[index] for rank in range(size))
        got = [sums[index] for sums in found if sums[index] is not None]
        torch.testing.assert_close(torch.cat(got).double(), total.flatten(), rtol=1e-6, atol=1e-6)
        if len(shape) == 2:
            assert len(got) == size


def several_added_up(way, owner):
    with pytest.MonkeyPatch.context() as patch:
        by(way, patch)
        mine = tensors_of(distributed.get_rank(), torch.bfloat16)
        transfers = [communication.reduce_to(owner, mine, tag=1), communication.reduce_to(owner, mine[:1], tag=2)]
        return [transfer.arrive() for transfer in reversed(transfers)]


@pytest.mark.parametrize("way", ["straight", "collectives"])
def test_several_tensors_are_added_up_together(ranks, way):
    exact = [sum(tensors_of(rank, torch.bfloat16)[index].double() for rank in range(2)) for index in range(len(SHAPES))]
    for owner in range(2):
        for rank, (one, many) in enumerate(ranks(2).run(several_added_up, way, owner)):
            if rank != owner:
                assert one is None
                assert many is None
                continue
            torch.testing.assert_close(one.double(), exact[0].flatten(), rtol=1e-2, atol=1e-2)
            whole = torch.cat([tensor.flatten() for tensor in exact])
            torch.testing.assert_close(many.double(), whole, rtol=1e-2, atol=1e-2)


def shared(way):
    rank = distributed.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        by(way, patch)
        found = tensors_of(7)
        for tensor, placement in zip(found, placements(), strict=True):
            for piece in placement:
                if piece.rank != rank:
                    communication.rows_of(tensor, piece).fill_(-1.0)
        communication.gather_pieces(zip(found, placements(), strict=True))
        return found


@pytest.mark.parametrize("way", ["straight", "collectives"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_every_piece(ranks, way, size):
    for found in ranks(size).run(shared, way):
        for tensor, wanted in zip(found, tensors_of(7), strict=True):
            assert torch.equal(tensor, wanted)
