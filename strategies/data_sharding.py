"""Parameters, gradients and optimizer state cut over the ranks that read different data: FSDP2 on any LightningModule.

Units are gathered when they compute: each layer of a module list, then each model. Lightning calls ``training_step``
and not ``forward``, so the LightningModule itself is no unit; a `protocols.LanguageModel` is gathered for `hidden` too,
and stays so until its gradients are done, because losses read the weight of its head.
"""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import LanguageModel

__all__ = ["gathered", "models_of", "set_synchronised", "shard_over_data"]


def shard_over_data(module: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool) -> None:
    """Cut all parameters of a LightningModule over the ranks of an axis.

    Args:
        module: Its children are models.
        mesh: One axis.
        reshard_after_forward: Free each layer after its forward pass, and gather it again for the backward pass.

    Raises:
        ConfigurationError: If a parameter belongs to no model, so that nothing would gather it.
    """
    models = list(models_of(module))
    covered = {id(parameter) for model in models for parameter in model.parameters()}
    alone = [name for name, parameter in module.named_parameters() if id(parameter) not in covered]
    if alone:
        raise ConfigurationError(
            f"The parameters {', '.join(alone[:3])} of {type(module).__name__} belong to no module that is called, so "
            "ranks could not keep them equal. Put each into an nn.Module of its own."
        )
    for model in models:
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        if isinstance(model, LanguageModel):
            register_fsdp_forward_method(model, "hidden")


def models_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are called as a whole: language models, and children that contain none."""
    for child in module.children():
        holds_models = any(isinstance(part, LanguageModel) for part in child.modules() if part is not child)
        if isinstance(child, LanguageModel) or not holds_models:
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from models_of(child)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            yield from part


def set_synchronised(module: nn.Module, synchronised: bool) -> None:
    """Say whether backward passes reduce gradients; otherwise they are added up on each rank.

    Args:
        module: Contains units.
        synchronised: True to reduce gradients in the next backward pass.
    """
    for unit in _units(module):
        unit.set_requires_gradient_sync(synchronised, recurse=False)


@contextlib.contextmanager
def gathered(module: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """Gather all units once, and keep them so: ranks may then run the model differently often.

    Args:
        module: Contains units.
        reshard_after_forward: Setting of the layers.
    """
    units = list(_units(module))
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        roots = {id(model) for model in models_of(module)} if reshard_after_forward else {id(unit) for unit in units}
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(id(unit) not in roots, recurse=False)


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))
