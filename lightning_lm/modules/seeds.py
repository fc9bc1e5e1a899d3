"""Randomness that depends on where a run stands and on nothing else, so that resuming repeats it."""

import torch

__all__ = ["seed_generator"]


def seed_generator(device: torch.device, *parts: int) -> None:
    """Seed the global generator of one device, and of no other.

    Args:
        device: Device of the model.
        parts: Numbers that name the moment: seed, rank, step, ... Each of them decides the random numbers.
    """
    seed = 0
    for part in parts:  # a linear congruential generator (Knuth's MMIX) that takes in a number at each step
        seed = ((seed + part) * 6364136223846793005 + 1442695040888963407) % 2**63
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
