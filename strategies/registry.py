"""Short names for YAML and ``Trainer(strategy="zero1")``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_lm.strategies.sharded_optimizer_strategy import ShardedOptimizerStrategy

__all__ = ["register_strategies"]


def register_strategies() -> None:
    """Make the short names known to Lightning, once. Importing ``lightning_lm.strategies`` does it."""
    for name, stage, what in (("zero1", 1, "optimizer state"), ("zero2", 2, "optimizer state and gradients")):
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, ShardedOptimizerStrategy, description=f"DDP, sharded {what}", stage=stage)
