"""Strategies for a stock Trainer."""

if __name__ != "lightning_lm.strategies":
    raise ImportError(f"This folder was imported as {__name__!r}; import it as 'lightning_lm.strategies'.")

from lightning_lm._lightning import register_strategies
from lightning_lm.strategies.checkpoints.atomic import AtomicCheckpointIO
from lightning_lm.strategies.checkpoints.background import BackgroundCheckpointIO
from lightning_lm.strategies.context_parallel import ContextParallelStrategy
from lightning_lm.strategies.data_parallel import DataParallelStrategy, GradientAverager
from lightning_lm.strategies.pipeline import PipelineStrategy
from lightning_lm.strategies.tensor_parallel.shard import shard_over_data
from lightning_lm.strategies.tensor_parallel.strategy import ShardedModelStrategy, TensorParallelStrategy
from lightning_lm.strategies.zero.optimizer import ShardedOptimizer
from lightning_lm.strategies.zero.strategy import ShardedOptimizerStrategy

__all__ = [
    "AtomicCheckpointIO",
    "BackgroundCheckpointIO",
    "ContextParallelStrategy",
    "DataParallelStrategy",
    "GradientAverager",
    "PipelineStrategy",
    "ShardedModelStrategy",
    "ShardedOptimizer",
    "ShardedOptimizerStrategy",
    "TensorParallelStrategy",
    "shard_over_data",
]

register_strategies()
