"""Batches of pairs, divided into micro-batches and over ranks."""

import torch


def part_of(batch, pairs) -> dict[str, torch.Tensor]:
    """Cut out pairs: each has a row in both halves."""
    count = len(batch["margin"])
    rows = torch.cat([torch.arange(count)[pairs], torch.arange(count)[pairs] + count])
    return {name: value[rows if len(value) == 2 * count else rows[: len(rows) // 2]] for name, value in batch.items()}


class Pieces:
    """A sized loader of micro-batches of pairs in order; each rank takes its share of every one."""

    def __init__(self, batch, size, trainer):
        self.batch, self.size, self.trainer = batch, size, trainer

    def __len__(self):
        return -(-len(self.batch["margin"]) // (self.size * self.trainer.num_devices))

    def __iter__(self):
        ranks, rank = self.trainer.num_devices, self.trainer.global_rank
        for first in range(0, len(self.batch["margin"]), self.size * ranks):
            yield part_of(self.batch, slice(first + rank, first + self.size * ranks, ranks))
