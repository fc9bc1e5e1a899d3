"""Products inside our operators, for torch's FLOP counter, which cannot look into them.

That counter's module loads Triton, so formulas wait until something else has loaded it (Lightning does), or until
`register_flops` is called.
"""

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["flop_formula", "register_flops"]

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def flop_formula(operator: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make a function the FLOP count of an operator; it takes shapes in place of tensors.

    Args:
        operator: ``torch.ops.lightning_lm.<name>``.
    """

    def wait(formula: Callable[..., int]) -> Callable[..., int]:
        _waiting.append((operator, formula))
        if _COUNTER in sys.modules:
            register_flops()
        return formula

    return wait


def register_flops() -> None:
    """Tell `torch.utils.flop_counter.FlopCounterMode` about our operators; call it before one is made.

    Only needed where `lightning_lm.kernels` was imported before anything that loads the counter.
    """
    from torch.utils.flop_counter import register_flop_formula

    while _waiting:
        operator, formula = _waiting.pop()
        register_flop_formula(operator)(formula)
