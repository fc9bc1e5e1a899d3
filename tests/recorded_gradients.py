"""An optimizer that keeps the gradients of every step and moves nothing."""

import dataclasses

import torch

from lightning_lm.optim import OptimizerPart


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given and moves nothing."""

    def __init__(self, named):
        super().__init__(named, lr=0.0)
        self.names = [name for name, _ in named]
        self.seen = []

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        params = self.param_groups[0]["params"]
        self.seen.append({name: param.grad.clone() for name, param in zip(self.names, params, strict=True)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(OptimizerPart):
    def children(self, parameters):
        return [Recorder([(entry.name, entry.parameter) for entry in parameters])]
