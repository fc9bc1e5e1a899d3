"""Settings of Lightning's `DDPStrategy` that strategies below it pass on."""

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

__all__ = ["without_defaults"]


def without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the defaults of `DDPStrategy` and torch's wrapper.

    A configuration in YAML lists every argument of the classes above with its default, as if it had been asked for.

    Args:
        settings: By name.
    """
    constructors = (DistributedDataParallel.__init__, DDPStrategy.__init__)
    parameters = [
        parameter for function in constructors for parameter in inspect.signature(function).parameters.values()
    ]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    return {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}
