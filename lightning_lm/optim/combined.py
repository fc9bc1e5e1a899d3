"""Several optimizers behind the interface of one, as Lightning's automatic optimization takes only one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch.optim import Optimizer

from lightning_lm.errors import CheckpointError, ConfigurationError

__all__ = ["CombinedOptimizer", "require_complete"]

_Groups = list[dict[str, Any]]


class CombinedOptimizer(Optimizer):
    """One optimizer whose parameter groups are those of its children.

    Gradient clipping, learning-rate schedulers, `LearningRateMonitor`, AMP's `GradScaler` and checkpoints see one
    ordinary optimizer. State dictionaries have torch's layout; parameters with names are found by name, so the groups
    may be cut differently when a run is resumed.

    Args:
        children: Optimizers with no parameter in common.

    Raises:
        ConfigurationError: If there are no children, or a parameter belongs to two.
    """

    def __init__(self, children: Sequence[Optimizer]) -> None:
        if not children:
            raise ConfigurationError("CombinedOptimizer got no optimizer; give it at least one.")
        params = [param for child in children for group in child.param_groups for param in group["params"]]
        if len({id(param) for param in params}) < len(params):
            raise ConfigurationError("A parameter belongs to two of the optimizers; each must be in exactly one.")
        self.children = tuple(children)
        for child in children:
            for group in child.param_groups:
                group.setdefault("optimizer", type(child).__name__)
        self._complete = False
        # The base class keeps the dictionaries it is given, so children and schedulers share them.
        super().__init__([group for child in children for group in child.param_groups], {})
        self._share(dict(_joint_state(children)), self.param_groups)
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group that comes later: no child would train it.

        Raises:
            ConfigurationError: Once the optimizer is made.
        """
        if self._complete:
            raise ConfigurationError(
                "CombinedOptimizer cannot take another group of parameters: it would not know which of "
                f"{[type(child).__name__ for child in self.children]} should train it. Give each of its optimizers all "
                "parameters from the beginning; those that do not require a gradient yet are passed over."
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let each child drop its gradients, or set them to zero."""
        for child in self.children:
            child.zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Evaluate the closure once, then let each child take its step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for child in self.children:
            child.step()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of all children.

        Raises:
            CheckpointError: If it has other parameters, or comes from other optimizers.
        """
        arranged = _arrange(state_dict, self.param_groups)
        super().load_state_dict(arranged)
        self._share(self.state, self.param_groups)
        for child in self.children:
            require_complete(child)

    def _share(self, state: Mapping[Any, Any], groups: _Groups) -> None:
        """Make children and this optimizer hold the same state and the same groups."""
        self.state.update(state)
        start = 0
        for child in self.children:
            stop = start + len(child.param_groups)
            child.__setstate__({"state": self.state, "param_groups": groups[start:stop]})
            start = stop


def require_complete(optimizer: Optimizer) -> None:
    """Check that an optimizer has all of its settings after a state dictionary was loaded.

    torch takes the groups of any optimizer without a word, and the next step would miss a setting.

    Args:
        optimizer: With its new groups.

    Raises:
        CheckpointError: If another kind of optimizer wrote them, with the missing settings.
    """
    for group in optimizer.param_groups:
        # torch itself adds "differentiable" to the defaults when it loads.
        missing = [name for name in optimizer.defaults if name not in group and name != "differentiable"]
        if missing:
            raise CheckpointError(
                f"The checkpoint's optimizer state was not written by {type(optimizer).__name__}: its groups lack "
                f"{', '.join(missing)} and have {', '.join(name for name in group if name != 'params')}. Resume with "
                "the optimizer that wrote it, or load the weights only."
            )


def _joint_state(children: Sequence[Optimizer]) -> dict[Any, Any]:
    return {param: state for child in children for param, state in child.state.items()}


def _arrange(state_dict: Mapping[str, Any], groups: _Groups) -> dict[str, Any]:
    """Order a state dictionary as the groups are, by parameter name where there are names.

    Raises:
        CheckpointError: If parameters or kinds of optimizer differ.
    """
    saved_groups: _Groups = state_dict["param_groups"]
    if not all("param_names" in group for group in [*groups, *saved_groups]):
        _require_same_sizes(saved_groups, groups)
        return dict(state_dict)
    saved = {
        name: (index, group)
        for group in saved_groups
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    wanted = [name for group in groups for name in group["param_names"]]
    _require_same_names(set(saved), set(wanted))
    arranged: _Groups = []
    for group in groups:
        origins = [saved[name] for name in group["param_names"]]
        _require_same_kind(group, [origin for _, origin in origins])
        template = origins[0][1] if origins else {}
        changed: dict[str, Any] = {key: group[key] for key in ("name", "param_names") if key in group}
        arranged.append({**group, **template, **changed, "params": [index for index, _ in origins]})
    return {**state_dict, "param_groups": arranged}


def _require_same_sizes(saved: _Groups, groups: _Groups) -> None:
    found, needed = [len(group["params"]) for group in saved], [len(group["params"]) for group in groups]
    if found != needed:
        raise CheckpointError(
            f"The checkpoint's optimizer has groups of {found} parameters, this run's has {needed}; "
            "resume with the model and the optimizer that wrote it, or load the weights only."
        )


def _require_same_names(saved: set[str], wanted: set[str]) -> None:
    if saved != wanted:
        raise CheckpointError(
            f"The optimizer of the checkpoint lacks {sorted(wanted - saved)[:3]} and has {sorted(saved - wanted)[:3]} "
            "beside the parameters of this model; resume with the model that wrote it, or load the weights only."
        )


def _require_same_kind(group: Mapping[str, Any], origins: _Groups) -> None:
    kinds = {origin.get("optimizer") for origin in origins}
    if kinds - {group.get("optimizer")}:
        raise CheckpointError(
            f"{group['param_names'][0]!r} and others were trained with {sorted(map(str, kinds))}, this run gives them "
            f"to {group.get('optimizer')}; resume with the optimizer that wrote the checkpoint, or load weights only."
        )
