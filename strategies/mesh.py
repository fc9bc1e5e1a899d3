"""Ranks in two axes: those that read different data, and those that share each matrix."""

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from lightning_lm._lightning import set_mesh_sizes
from lightning_lm.errors import ConfigurationError

__all__ = ["_MeshStrategy"]


class _MeshStrategy(ModelParallelStrategy):
    """`ModelParallelStrategy` that finds its mesh by itself and counts each rank's data once.

    Args:
        tensor_parallel_size: Ranks that share each matrix; "auto" for all of a node.
        **settings: For `ModelParallelStrategy`.
    """

    def __init__(self, tensor_parallel_size: int | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        self.tensor_parallel_size = tensor_parallel_size

    def setup_environment(self) -> None:
        """Form the mesh: neighbouring ranks share matrices."""
        world_size = self.num_nodes * self.num_processes
        size = self.num_processes if self.tensor_parallel_size == "auto" else self.tensor_parallel_size
        if size < 1 or world_size % size:
            fitting = [str(divisor) for divisor in range(1, world_size + 1) if world_size % divisor == 0]
            raise ConfigurationError(
                f"tensor_parallel_size={size} does not divide the {world_size} processes; use {', '.join(fitting)}."
            )
        set_mesh_sizes(self, data_parallel=world_size // size, tensor_parallel=size)
        super().setup_environment()

    @property
    def data_mesh(self) -> DeviceMesh:
        """The ranks that read different data."""
        return self.device_mesh["data_parallel"]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the ranks that read different data, so that nothing counts twice."""
        return super().reduce(tensor, group or self.data_mesh.get_group(), reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather from the ranks that read different data."""
        return super().all_gather(tensor, group or self.data_mesh.get_group(), sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Let all ranks agree."""
        votes = torch.tensor(int(decision), device=self.root_device)
        distributed.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)
