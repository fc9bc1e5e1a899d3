"""The only file that touches a private name of Lightning; a test says which when one is renamed."""

import functools
import importlib
from typing import Any

__all__ = ["register_strategies", "set_mesh_sizes"]

_SHORT_NAMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "zero1": ("ShardedOptimizerStrategy", {"stage": 1}, "DDP, sharded optimizer state"),
    "zero2": ("ShardedOptimizerStrategy", {"stage": 2}, "DDP, sharded optimizer state and gradients"),
    "tensor_parallel": ("TensorParallelStrategy", {"tensor_parallel_size": "auto"}, "matrices split over a node"),
    "fsdp2": ("TensorParallelStrategy", {"tensor_parallel_size": 1}, "all sharded"),
}
_OURS = "lightning_lm.strategies"
_CLASSES: dict[str, tuple[str, ...]] = {
    _OURS: ("ContextParallelStrategy", "DataParallelStrategy", "PipelineStrategy", "ShardedOptimizerStrategy"),
    "lightning.pytorch.strategies": ("DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"),
}
_CLASSES[_OURS] += ("TensorParallelStrategy",)


def register_strategies() -> None:
    """Add short names and class names of strategies to Lightning's registry, once.

    Lightning has no entry points for strategies, so ``modules``, ``datamodules``, ``callbacks`` and ``strategies`` do
    this when they are imported; a strategy itself is imported when its name is used.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    entries = {name: (_OURS, *entry) for name, entry in _SHORT_NAMES.items()}
    for module, names in _CLASSES.items():  # a Trainer reads names in lower case
        entries |= {name.lower(): (module, name, {}, name) for name in names}
    for name, (module, cls, settings, description) in entries.items():
        if name not in StrategyRegistry:
            factory = functools.partial(_build, module, cls)
            StrategyRegistry.register(name, factory, description=description, **settings)


def _build(module: str, name: str, **settings: Any) -> Any:
    return getattr(importlib.import_module(module), name)(**settings)


def set_mesh_sizes(strategy: Any, *, data_parallel: int, tensor_parallel: int) -> None:
    """Tell a `ModelParallelStrategy` the sizes of its mesh once the number of processes is known.

    Its own "auto" makes as many data-parallel ranks as there are nodes, whatever the other size.

    Args:
        strategy: Not yet set up.
        data_parallel: Ranks that read different data.
        tensor_parallel: Ranks that share each matrix.
    """
    strategy._data_parallel_size = data_parallel
    strategy._tensor_parallel_size = tensor_parallel
