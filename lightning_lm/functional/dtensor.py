"""Local shard of a DTensor."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

__all__ = ["cut_like", "local_part", "reshard"]


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; changing it in place changes the tensor.

    Args:
        tensor: Shared or not.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that a rank holds of a tensor laid out like another.

    Args:
        whole: All of it.
        like: The layout.
    """
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    # FSDP2 cuts over the data axis, which is the first, what is already split over the others.
    for axis, place in reversed(list(enumerate(like.placements))):
        dim = getattr(place, "dim", None)
        if dim is not None:
            size = whole.shape[dim]
            shard_size = -(-size // mesh.size(axis))
            start = min(size, shard_size * mesh.get_local_rank(axis))
            whole = whole.narrow(dim, start, min(shard_size, size - start))
    return whole


def reshard(module: nn.Module) -> None:
    """Free what FSDP2 has gathered to compute with; parameters are again the shards that the optimizer knows.

    Args:
        module: Contains units, or none.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
