"""ZeRO: optimizer state, and gradients if wished, partitioned over the ranks of data-parallel training."""

__all__: list[str] = []
