"""Reduction of gradients to the ranks that update their parameters, during the backward pass (ZeRO, stage 2)."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.strategies.zero.communication import Transfer, reduce_rows, reduce_to
from lightning_lm.strategies.zero.optimizer import ShardedOptimizer
from lightning_lm.strategies.zero.ownership import Ownership
from lightning_lm.strategies.zero.partition import Piece

__all__ = ["GradientReducer"]

_BUCKET_BYTES = 25 * 2**20
_ON_THE_WAY_BYTES = 4 * _BUCKET_BYTES
"""Pending bytes at which the backward pass waits, so that gradients are freed as it goes."""


class _Bucket:
    """Parameters of one rank, or one split parameter, whose gradients are reduced together."""

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        self.pieces = pieces
        self.params: list[nn.Parameter] = []
        self.num_bytes = 0
        self.waiting = 0

    def takes(self, param: nn.Parameter) -> bool:
        return self.num_bytes + param.nbytes <= _BUCKET_BYTES and param.dtype == self.params[0].dtype


class _Sent(NamedTuple):
    """Pending transfer; nothing else may reference its memory."""

    transfer: Transfer
    targets: list[Any]
    """Parameters whose gradients the total will be, on the rank that gets it."""


class GradientReducer:
    """Averages each gradient on the rank that updates its parameter, and frees it on all others.

    Between `begin` and `finish` a bucket of gradients is reduced as soon as the backward pass has made all of them, in
    the same order on every rank. Parameters that took no part in a rank's loss count as zero there; one that no rank
    used gets a gradient of zeros. Parameters may be frozen, unfrozen and added to an optimizer between steps, on all
    ranks alike.

    With gradient accumulation the average is added to that of earlier micro-batches; or backward passes outside `begin`
    and `finish` accumulate on each rank, and the last one reduces the sums.

    Args:
        optimizers: Optimizers whose ownership assigns parameters to ranks.
        find_unused: Leave a parameter that no rank used without a gradient; costs a small all-reduce and a device
            synchronisation at each backward pass.

    Raises:
        ConfigurationError: If two optimizers share a parameter and not its place.

    Source:
        Rajbhandari et al. 2019, arXiv:1910.02054, section 5.2 (ZeRO, stage 2).
    """

    def __init__(self, optimizers: Iterable[ShardedOptimizer], *, find_unused: bool = False) -> None:
        self._find_unused, self._optimizers = find_unused, list(optimizers)
        self._num_ranks, self._rank = distributed.get_world_size(), distributed.get_rank()
        self._reduced: dict[Tensor, Tensor] = {}
        self._transfers: deque[_Sent] = deque()
        self._active, self._paused, self._next = False, False, 0
        self._seen: set[nn.Parameter] = set()
        self._hooks: list[Any] = []
        self._fill_buckets()

    def _fill_buckets(self) -> None:
        """Assign the parameters that are trained now to buckets, and hook their gradients."""
        self._owners: dict[nn.Parameter, Ownership] = {}
        for optimizer in self._optimizers:
            _require_all_ranks(optimizer.ownership)
            _require_apart(self._owners, optimizer.ownership)
            self._owners.update(
                (cast(nn.Parameter, param), optimizer.ownership) for param in optimizer.ownership.placements
            )
        self._buckets = self._cut()
        self._bucket_of = {param: bucket for bucket in self._buckets for param in bucket.params}
        for hook in self._hooks:
            hook.remove()
        self._hooks = [param.register_post_accumulate_grad_hook(self._ready) for param in self._bucket_of]

    def _trains_others(self) -> bool:
        """Return whether layers were frozen or unfrozen, or optimizers given other parameters."""
        params = [param for optimizer in self._optimizers for param in optimizer.ownership.placements]
        return {id(param) for param in params if param.requires_grad} != {id(param) for param in self._bucket_of}

    def _cut(self) -> list[_Bucket]:
        """Fill buckets in reverse order of parameters, about that of the backward pass."""
        closed: list[_Bucket] = []
        filling: dict[int, _Bucket] = {}
        for param in reversed([param for param in self._owners if param.requires_grad]):
            pieces = self._owners[param].placements[param]
            bucket = filling.get(pieces[0].rank)
            if len(pieces) > 1 or bucket is None or not bucket.takes(param):
                bucket = _Bucket(pieces)
                closed.append(bucket)
                if len(pieces) == 1:
                    filling[pieces[0].rank] = bucket
            bucket.params.append(param)
            bucket.num_bytes += param.nbytes
        # A bucket is reduced when its last gradient is there: in the order in which they are full, not started.
        position = {param: index for index, param in enumerate(reversed(list(self._owners)))}
        return sorted(closed, key=lambda bucket: position[bucket.params[-1]])

    def begin(self) -> None:
        """Prepare to reduce the gradients of the next backward pass."""
        if self._paused:
            self._require_fresh()
            return
        if self._trains_others():
            self._fill_buckets()
        self._active, self._next = True, 0
        self._transfers.clear()
        self._seen.clear()
        for bucket in self._buckets:
            bucket.waiting = len(bucket.params)
        kept, self._reduced = self._reduced, {}
        for target, gradient in kept.items():
            if target.grad is gradient:  # nobody has dropped it: this pass adds to it
                self._reduced[target] = gradient
                target.grad = None

    def finish(self) -> None:
        """Send what is left and wait until all has arrived."""
        if self._paused:
            return
        self._require_no_others()
        unused = self._unused()
        while self._next < len(self._buckets):
            self._launch(self._buckets[self._next])
        while self._transfers:
            self._arrive(self._transfers.popleft())
        for param in unused:
            local = self._owners[param].local(param)
            if local is not None and self._reduced.get(local) is None:
                local.grad = None
        self._reduced = {target: target.grad for target in self._targets() if target.grad is not None}
        self._active = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let backward passes add up gradients where they are made."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def close(self) -> None:
        """Release the parameters and their hooks."""
        for hook in self._hooks:
            hook.remove()
        self._reduced.clear()

    def _require_fresh(self) -> None:
        if any(target.grad is gradient for target, gradient in self._reduced.items()):
            raise ConfigurationError(
                "A backward pass without an exchange follows one with an exchange and no zero_grad lies between, so "
                "averages and sums of one rank would mix. Call zero_grad first, or exchange at every pass."
            )
        self._reduced.clear()

    def _require_no_others(self) -> None:
        if any(param.grad is not None and param not in self._bucket_of for param in self._owners):
            raise ConfigurationError(
                "A parameter that was frozen when the backward pass began has a gradient now. Unfreeze it before "
                "training_step returns its loss, or use ShardedOptimizerStrategy(stage=1)."
            )

    def _targets(self) -> Iterator[Tensor]:
        for param, ownership in self._owners.items():
            local = ownership.local(param)
            if local is not None:
                yield local

    def _ready(self, param: Tensor) -> None:
        if not self._active:
            return
        assert isinstance(param, nn.Parameter)
        if param in self._seen:
            raise ConfigurationError(
                "A parameter got a gradient twice in one backward pass, after the first was sent away. Use activation "
                "checkpointing with use_reentrant=False, or ShardedOptimizerStrategy(stage=1)."
            )
        self._seen.add(param)
        self._bucket_of[param].waiting -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].waiting == 0:
            self._launch(self._buckets[self._next])

    def _unused(self) -> list[nn.Parameter]:
        """Return parameters that no rank has used."""
        if not self._find_unused:
            return []
        params = list(self._bucket_of)
        used = torch.tensor([param in self._seen or param.grad is not None for param in params], dtype=torch.int32)
        used = used.to(params[0].device)
        distributed.all_reduce(used, distributed.ReduceOp.MAX)
        return [param for param, count in zip(params, used.tolist(), strict=True) if not count]

    def _launch(self, bucket: _Bucket) -> None:
        self._next += 1
        gradients = [torch.zeros_like(param) if param.grad is None else param.grad for param in bucket.params]
        for param in bucket.params:
            param.grad = None
        self._make_room()
        if len(bucket.pieces) > 1:
            local = self._owners[bucket.params[0]].local(bucket.params[0])
            transfers = reduce_rows(gradients[0], bucket.pieces, tag=self._next)
            self._transfers += [_Sent(transfer, [local]) for transfer in transfers]
        else:
            transfer = reduce_to(bucket.pieces[0].rank, gradients, tag=self._next)
            self._transfers.append(_Sent(transfer, list(bucket.params)))

    def _make_room(self) -> None:
        on_the_way = sum(sent.transfer.num_bytes for sent in self._transfers)
        while self._transfers:
            first = self._transfers[0].transfer
            if on_the_way <= _ON_THE_WAY_BYTES and not first.is_completed():
                return
            on_the_way -= first.num_bytes
            self._arrive(self._transfers.popleft())

    def _arrive(self, sent: _Sent) -> None:
        total = sent.transfer.arrive()
        if total is None:
            return
        parts = total.div_(self._num_ranks).split([target.numel() for target in sent.targets])
        for target, part in zip(sent.targets, parts, strict=True):
            before = self._reduced.get(target)
            target.grad = part.view(target.shape) if before is None else before.add_(part.view(target.shape))


def _require_all_ranks(ownership: Ownership) -> None:
    group = ownership.group
    size = distributed.get_world_size()
    ranks = list(range(size)) if group is None else distributed.get_process_group_ranks(group)
    if ranks != list(range(size)):
        raise ConfigurationError(
            f"The optimizer is sharded over a process_group of {len(ranks)} of {size} ranks, and stage=2 averages "
            "gradients over all of them. Leave process_group out, or use stage=1."
        )


def _require_apart(owners: dict[nn.Parameter, Ownership], ownership: Ownership) -> None:
    for param, placement in ownership.placements.items():
        other = owners.get(cast(nn.Parameter, param))
        if other is not None and other.placements[param] != placement:
            raise ConfigurationError(
                f"Two optimizers share a parameter of shape {tuple(param.shape)}, and ranks that update it for one do "
                'not for the other, so its gradient would have two owners. Give its group "shard": "whole" in both, '
                "or use ShardedOptimizerStrategy(stage=1)."
            )
