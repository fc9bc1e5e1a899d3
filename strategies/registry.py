"""Short names for YAML and ``Trainer(strategy="zero1")``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_lm.strategies.sharded_optimizer_strategy import ShardedOptimizerStrategy
from lightning_lm.strategies.tensor_parallel import TensorParallelStrategy

__all__ = ["register_strategies"]


def register_strategies() -> None:
    """Make the short names known to Lightning, once. Importing ``lightning_lm.strategies`` does it."""
    for name, stage, what in (("zero1", 1, "optimizer state"), ("zero2", 2, "optimizer state and gradients")):
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, ShardedOptimizerStrategy, description=f"DDP, sharded {what}", stage=stage)
    for name, size, what in (("tensor_parallel", "auto", "matrices split over a node"), ("fsdp2", 1, "all sharded")):
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, TensorParallelStrategy, description=what, tensor_parallel_size=size)
