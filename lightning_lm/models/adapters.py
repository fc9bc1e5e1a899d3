"""Low-rank adapters of ``peft`` as part of the weights: what is exported, and what an inference server gets."""

import copy

from torch import nn

from lightning_lm.errors import MissingDependencyError

__all__ = ["merge_adapters"]


def merge_adapters(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which the adapters are part of the weights, and their modules are gone.

    Args:
        model: Has adapters of ``peft``. It stays as it is.

    Raises:
        MissingDependencyError: If ``peft`` is not installed.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper
    except ImportError as error:
        raise MissingDependencyError("peft", "merge low-rank adapters", "hf") from error
    merged = copy.deepcopy(model)
    for name, child in list(merged.named_modules()):
        if isinstance(child, BaseTunerLayer):
            child.merge()
            merged.set_submodule(name, child.get_base_layer())
        elif isinstance(child, ModulesToSaveWrapper):
            merged.set_submodule(name, child.modules_to_save[child.active_adapters[0]])
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged.requires_grad_(True)
