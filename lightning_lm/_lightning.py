"""The only file that touches a private name of Lightning; a test says which when one is renamed."""

from typing import Any

__all__ = ["set_mesh_sizes"]


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
