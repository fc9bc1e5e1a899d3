"""Sharding of the state of any torch optimizer over ranks (ZeRO, stage 1)."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_lm.errors import ConfigurationError
from lightning_lm.optim.combined import require_complete
from lightning_lm.strategies.zero.communication import gather_pieces, gather_states, map_tensors
from lightning_lm.strategies.zero.local_view import Closure, OnlyLocal
from lightning_lm.strategies.zero.ownership import Ownership
from lightning_lm.strategies.zero.partition import MIN_SPLIT_ELEMENTS

__all__ = ["ShardedOptimizer", "with_splits"]

_NAMES = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "Rprop", "ASGD")
_ELEMENTWISE = frozenset(getattr(torch.optim, name) for name in _NAMES)
"""Elementwise optimizers; their subclasses may not be."""
_ORIGIN = "_saved_as"
_NAMED: dict[tuple[type, type], type] = {}


class _Wrapper(Optimizer):
    """An optimizer whose state, defaults and hooks are those of another, also if others are assigned."""

    inner: Optimizer

    @property
    def state(self) -> Any:
        """State of the parameters that this rank updates."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Default settings of a group."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register with the wrapped optimizer."""
        return self.inner.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register with the wrapped optimizer."""
        return self.inner.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register with the wrapped optimizer."""
        return self.inner.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register with the wrapped optimizer."""
        return self.inner.register_load_state_dict_post_hook(hook, prepend)


class ShardedOptimizer(_Wrapper, Joinable):
    """An optimizer with sharded state: each rank updates its shard of the parameters, then all-gathers the others.

    The wrapped optimizer has every parameter in its groups; those of other ranks are hidden only during its step, and
    since optimizers create state at the first step, each rank has the state of its own shard only. Everything else
    (schedulers, clipping, `GradScaler`, `LearningRateMonitor`) sees the ordinary groups. `full_state_dict` is that of
    the wrapped optimizer alone, so any number of ranks, one included, can load it.

    Parameters stay whole for optimizers that work on matrices (Muon, SOAP); large ones of elementwise optimizers are
    split by rows. A group chooses with ``"shard": "whole"`` or ``"rows"``; by default the optimizer's class decides.
    Gradients must be the same on all ranks (`DistributedDataParallel`), or be on the shard that `Ownership.local`
    returns. Ranks with fewer batches than others can leave early through `torch.distributed.algorithms.Join`.

    Args:
        optimizer: Optimizer to wrap; or parameters, or groups, for ``optimizer_class``.
        optimizer_class: Class of the optimizer, if parameters are given.
        min_split_elements: Number of elements from which a parameter is split by rows.
        process_group: Ranks over which the state is sharded; by default all.
        beside: Another optimizer of the same model, which may have some of the same parameters: each of those is then
            updated by one rank only.
        **settings: Arguments of ``optimizer_class``.

    Raises:
        ConfigurationError: If the optimizer cannot be sharded.

    Source:
        Rajbhandari et al. 2019, arXiv:1910.02054 (ZeRO, stage 1); placement by whole parameters as in
        `torch.distributed.optim.ZeroRedundancyOptimizer`.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> optimizer = ShardedOptimizer(torch.optim.AdamW(layer.parameters(), fused=True))
        >>> same = ShardedOptimizer(layer.parameters(), torch.optim.AdamW, lr=1e-3)
    """

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Any],
        optimizer_class: type[Optimizer] | None = None,
        *,
        min_split_elements: int = MIN_SPLIT_ELEMENTS,
        process_group: distributed.ProcessGroup | None = None,
        beside: "ShardedOptimizer | None" = None,
        **settings: Any,
    ) -> None:
        Joinable.__init__(self)
        self.inner = _built(optimizer, optimizer_class, settings)
        self.__class__ = _named_as(type(self.inner), type(self))
        others = None if beside is None else beside.ownership
        self.ownership: Ownership = Ownership(min_split_elements, process_group, others)
        _require_shardable(self.inner, self.ownership.num_ranks)
        Optimizer.__setstate__(self, {})  # makes the hooks of torch; all else is the wrapped one's
        self._take_in(self.param_groups)

    def __eq__(self, other: object) -> bool:
        """Equal the wrapped optimizer too: schedulers know that one, and `LearningRateMonitor` compares."""
        return True if self is other or self.inner is other else NotImplemented

    def __hash__(self) -> int:
        return hash(self.inner)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (type(self.inner), type(self).__mro__[1]), self.__getstate__()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the wrapped optimizer; callbacks that resume assign others."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups
        self._take_in(groups)

    def local_gradients(self) -> list[Tensor]:
        """Return the gradients of all that this rank updates."""
        local = [part for group in self.param_groups for part in self.ownership.locals(group["params"])]
        return [part.grad for part in local if part.grad is not None]

    def _take_in(self, groups: list[dict[str, Any]]) -> None:
        pairs = with_splits(self.inner, groups)
        self.ownership.take_in([param for param, _ in pairs], [splits for _, splits in pairs])
        for param, _ in pairs:
            self._shed(param)

    def _shed(self, param: Tensor) -> None:
        """Keep of a state that is there already what this rank needs."""
        local = self.ownership.local(param)
        if local is param or param not in self.state:
            return
        state = self.state.pop(param)
        if local is not None:
            self.state[local] = self.ownership.local_state(param, state)

    # --- what an optimizer does ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more parameters; those that are there stay where they are."""
        self.inner.add_param_group(param_group)
        self._take_in(self.param_groups[-1:])

    def zero_grad(self, *args: Any, **settings: Any) -> None:
        """Drop, or set to zero, all gradients, those of rows too.

        Args:
            *args: As the wrapped optimizer has them: ``set_to_none``.
            **settings: The same.
        """
        self.inner.zero_grad(*args, **settings)
        for param, rows in self.ownership.rows.items():
            if rows.grad is not None and (param.grad is not None or False in (*args, *settings.values())):
                rows.grad.zero_()
            else:
                rows.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **settings: Any) -> Any:
        """Update what this rank has, and exchange parameters. Every rank must call this.

        Args:
            closure: Computes gradients and returns the loss; evaluated in the step of the wrapped optimizer,
                on several ranks at most once.
            **settings: For the ``step`` of the wrapped optimizer.

        Returns:
            Whatever the wrapped optimizer returns.

        Raises:
            ConfigurationError: If the wrapped optimizer evaluates the closure more than once, on several ranks.
        """
        Join.notify_join_context(self)
        with OnlyLocal(self.inner, self.ownership) as view:
            if closure is not None:
                settings["closure"] = Closure(view, closure)
            result = self.inner.step(**settings)
        if self.ownership.num_ranks > 1:
            pieces = ((param.detach(), pieces) for param, pieces in self.ownership.placements.items())
            gather_pieces(pieces, self.ownership.group)
        return result

    @contextlib.contextmanager
    def _groups_of(self, choose: Callable[[Sequence[Tensor]], list[Tensor]]) -> Iterator[None]:
        """Let the groups hold other tensors for a while. A loaded state brings new groups in the same order."""
        params = [group["params"] for group in self.inner.param_groups]
        for group in self.inner.param_groups:
            group["params"] = choose(group["params"])
        try:
            yield
        finally:
            for group, before in zip(self.inner.param_groups, params, strict=True):
                group["params"] = before

    # --- state dictionaries ---

    def state_dict(self) -> dict[str, Any]:
        """Return the state that this rank has, laid out and numbered as the wrapped optimizer's."""
        with self._groups_of(self.ownership.with_rows):
            return dict(self.inner.state_dict())

    def full_state_dict(self) -> dict[str, Any] | None:
        """Return on rank 0, on the CPU, what the wrapped optimizer alone would have. Collective: call on all ranks.

        Returns:
            A state dictionary on rank 0, ``None`` elsewhere.
        """
        local = self.state_dict()
        if self.ownership.num_ranks == 1:
            return local
        numbers = _numbers(local, [group["params"] for group in self.param_groups])
        placements = self.ownership.placements
        splits = {numbers[param]: pieces for param, pieces in placements.items() if len(pieces) > 1}
        device = next(iter(placements)).device
        states = gather_states(local["state"], splits, device, self.ownership.group)
        return None if states is None else {**local, "state": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take from a full state dictionary what this rank needs.

        Args:
            state_dict: State of the wrapped optimizer, from any number of ranks.

        Raises:
            CheckpointError: If another kind of optimizer wrote it.
        """
        states = state_dict["state"]
        with self._groups_of(self.ownership.with_rows):
            kept: dict[Any, Any] = {}
            for param, number in self._origins(state_dict).items():
                if self.ownership.local(param) is not None:
                    kept[number] = self.ownership.local_state(param, states[number])
            self.inner.load_state_dict({**state_dict, "state": kept})
        require_complete(self.inner)

    def _origins(self, state_dict: Mapping[str, Any]) -> dict[Tensor, Any]:
        """Return under which number each parameter was saved.

        Only the wrapped optimizer knows (it may go by names): it is given a state that holds numbers and no tensors.
        """
        outline = {
            number: {**map_tensors(state, lambda value: value if value.dim() == 0 else value[:0]), _ORIGIN: number}
            for number, state in state_dict["state"].items()
        }
        self.inner.load_state_dict({**state_dict, "state": outline})
        params = list(self.ownership.placements)
        pairs = zip(params, self.ownership.with_rows(params), strict=True)
        return {param: self.inner.state[part][_ORIGIN] for param, part in pairs if part in self.inner.state}

    # --- ranks that run out of batches early ---

    def join_hook(self, **settings: Any) -> JoinHook:
        """Return what a rank without batches does meanwhile: it takes each step with the gradients it has.

        Args:
            **settings: Those of `torch.distributed.algorithms.Join`; none is used.
        """
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.ownership.placements)).device

    @property
    def join_process_group(self) -> Any:
        """Ranks over which the state is sharded."""
        return self.ownership.group or distributed.group.WORLD


class _Shadow(JoinHook):
    def __init__(self, optimizer: ShardedOptimizer) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        self._optimizer.step()


def _require_shardable(optimizer: Optimizer, num_ranks: int) -> None:
    if num_ranks > 1 and isinstance(optimizer, LBFGS | SparseAdam):
        raise ConfigurationError(
            f"{type(optimizer).__name__} cannot be sharded over {num_ranks} ranks: it needs all parameters, or sparse "
            'gradients. Use another optimizer, or the strategy "ddp".'
        )


def _built(
    optimizer: Optimizer | Iterable[Any], optimizer_class: type[Optimizer] | None, settings: Mapping[str, Any]
) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        if optimizer_class is None:
            raise ConfigurationError(
                "ShardedOptimizer got parameters and no class of optimizer; give it an optimizer, or "
                "ShardedOptimizer(params, torch.optim.AdamW, lr=...)."
            )
        optimizer = optimizer_class(optimizer, **settings)
    elif optimizer_class is not None or settings:
        raise ConfigurationError(
            f"ShardedOptimizer got a {type(optimizer).__name__} and also settings for one; give it the optimizer alone."
        )
    return optimizer


def _named_as(kind: type, base: type) -> type:
    """Return a class with the name of the wrapped one, always the same: callbacks name and number what they log so."""
    if (kind, base) not in _NAMED:
        _NAMED[kind, base] = type(base)(
            kind.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__}
        )
    return _NAMED[kind, base]


def _new(kind: type, base: type) -> Any:
    """Return an empty object, for copies."""
    return object.__new__(_named_as(kind, base))


def with_splits(optimizer: Optimizer, groups: list[dict[str, Any]]) -> list[tuple[Tensor, bool]]:
    """Return the parameters of groups, each with whether its rows may be updated independently.

    Args:
        optimizer: An ordinary optimizer.
        groups: Its groups, or some of them.
    """
    kinds = _kinds(optimizer)
    shards = [group.get("shard", "rows" if kinds.get(id(group)) in _ELEMENTWISE else "whole") for group in groups]
    return [(param, how == "rows") for group, how in zip(groups, shards, strict=True) for param in group["params"]]


def _kinds(optimizer: Optimizer) -> dict[int, type[Optimizer]]:
    """Return the class that updates each group, also where one optimizer combines several."""
    children: tuple[Optimizer, ...] = getattr(optimizer, "children", (optimizer,))
    return {id(group): type(child) for child in children for group in child.param_groups}


def _numbers(state_dict: Mapping[str, Any], params: list[list[Tensor]]) -> dict[Tensor, int]:
    groups = state_dict["param_groups"]
    return {
        param: number
        for group, tensors in zip(groups, params, strict=True)
        for number, param in zip(group["params"], tensors, strict=True)
    }
