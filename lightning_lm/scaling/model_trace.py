"""Trace of a model's forward pass without memory: its activations, its FLOPs and the bytes that it moves.

A model on the meta device runs with fake tensors, which have shapes and no content. While it runs, autograd says which
tensors it would keep for the backward pass, so the activations of any module are counted and not estimated. Each is
assigned to the layer in which it is kept, for activation checkpointing, and to a place in the tensor-parallel regions,
which decides what of it a rank has. Only as many layers run as differ from each other.

What was simplified: kernels of `KernelSwap` and compiled layers keep less than what is counted here, and an attention
kernel keeps queries, keys, values, its output and one number for each query, as FlashAttention does.
"""

import contextlib
import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Checkpointing", "LayerTrace", "ModelTrace", "Split", "trace_model"]

Checkpointing = Literal["none", "blocks", "ops"]
"""Activations that the backward pass recomputes, as `LMModule` has them."""
_ATTENTION = "_scaled_dot_product"
_OUTSIDE = -1
_FREE = ("view", "expand", "transpose", "permute", "slice", "select", "detach", "alias", "empty", "t", "unsqueeze")


class Split(NamedTuple):
    """Bytes by their place in a tensor-parallel model; a model without plan has ``stream`` only."""

    stream: float = 0.0
    """Outside of the split regions: the whole row, or with sequence parallelism this rank's part of it."""
    entered: float = 0.0
    """Input of a split region: the whole row on every rank."""
    inner: float = 0.0
    """Inside: heads or features of this rank."""

    def local(self, size: int, *, sequence_parallel: bool) -> float:
        """Return the bytes of one rank.

        Args:
            size: Ranks that split each matrix.
            sequence_parallel: The stream is sharded along the sequence too.
        """
        return self.stream / (size if sequence_parallel else 1) + self.entered + self.inner / size

    def plus(self, other: "Split", times: float = 1.0) -> "Split":
        """Return the sum with a multiple of another.

        Args:
            other: Summand.
            times: Factor of the summand.
        """
        return Split(*(mine + times * its for mine, its in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """Bytes that one layer keeps for the backward pass, for a micro-batch.

    Args:
        saved: Everything that autograd keeps.
        inputs: The layer's input, which is all that checkpointing of blocks keeps.
        products: Results of matmuls and attention, which checkpointing of ops keeps besides.
        casts: Part of ``saved`` that is weights in the data type of autocast.
    """

    saved: Split = Split()
    inputs: Split = Split()
    products: Split = Split()
    casts: Split = Split()

    def plus(self, other: "LayerTrace", times: float = 1.0) -> "LayerTrace":
        """Return the sum with a multiple of another.

        Args:
            other: Summand.
            times: Factor of the summand.
        """
        return LayerTrace(**{name: own.plus(getattr(other, name), times) for name, own in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class ModelTrace:
    """A forward pass of one row.

    Args:
        context_length: Tokens of a row.
        layers: Traces of the layers that differ, each with the number of layers like it.
        rest: Bytes kept outside of layers, such as the embedding's output, or by their first alone.
        more_layers: Bytes that a further row adds to ``layers``; cast weights and tables of positions are shared.
        more_rest: Bytes that it adds to ``rest``.
        matmul_flops: FLOPs of the matmuls of the forward pass, without head and attention.
        moved_bytes: Operands and results of all other operations.
        launches: Number of operations.
    """

    context_length: int
    layers: tuple[tuple[LayerTrace, int], ...]
    rest: LayerTrace
    more_layers: tuple[LayerTrace, ...]
    more_rest: LayerTrace
    matmul_flops: float
    moved_bytes: float
    launches: float

    def activation_bytes(
        self, checkpointing: Checkpointing = "none", *, rows: int = 1, tensor: int = 1, sequence_parallel: bool = False
    ) -> float:
        """Return the most that is kept at once for the backward pass.

        With checkpointing a layer's activations exist once more while the backward pass is at it, and the casts of all
        weights lie in autocast's cache until the end of the forward pass.

        Args:
            checkpointing: Activations that are recomputed.
            rows: Rows of a micro-batch.
            tensor: Ranks that split each matrix.
            sequence_parallel: Shard the residual stream too.
        """

        def local(split: Split) -> float:
            return split.local(tensor, sequence_parallel=sequence_parallel)

        pairs = zip(self.layers, self.more_layers, strict=True)
        layers = [(layer.plus(more, rows - 1), number) for (layer, number), more in pairs]
        rest = local(self.rest.plus(self.more_rest, rows - 1).saved)
        if checkpointing == "none":
            return rest + sum(number * local(layer.saved) for layer, number in layers)
        kept = rest + sum(number * local(layer.inputs) for layer, number in layers)
        if checkpointing == "ops":
            kept += sum(number * local(layer.products) for layer, number in layers)
        cached = sum(number * local(layer.casts) for layer, number in layers)
        return kept + max([cached, *(local(layer.saved) for layer, _ in layers)])


def trace_model(
    model: nn.Module,
    run: Callable[[nn.Module, Tensor], Any],
    *,
    context_length: int,
    blocks: Sequence[nn.Module] = (),
    regions: Sequence[nn.Module] = (),
    autocast: torch.dtype | None = None,
    on_gpu: bool = True,
) -> ModelTrace:
    """Run a model's forward pass with fake tensors and return what it costs.

    Args:
        model: Model on the meta device.
        run: Calls the model with ids, int64 [1, context_length].
        context_length: Tokens of a row.
        blocks: Its layers, in the order in which they are called.
        regions: Modules whose matrices tensor parallelism splits; their input is the residual stream.
        autocast: Data type of automatic mixed precision.
        on_gpu: Count as on a GPU; a CPU computes attention of bfloat16 in float32. Stands float16 in for bfloat16.
    """
    half = torch.float16 if on_gpu else torch.bfloat16
    autocast = half if autocast == torch.bfloat16 else autocast
    one, two = (
        _trace(model, run, (rows, context_length), blocks=blocks, regions=regions, half=half, autocast=autocast)
        for rows in (1, 2)
    )
    layers, more = [], []
    for (layer, number), (larger, _) in zip(one.layers, two.layers, strict=True):
        layers.append((layer, number))
        more.append(larger.plus(layer, -1))
    return ModelTrace(
        context_length=context_length,
        layers=tuple(layers),
        rest=one.rest,
        more_layers=tuple(more),
        more_rest=two.rest.plus(one.rest, -1),
        matmul_flops=one.total("matmul"),
        moved_bytes=one.total("moved"),
        launches=one.total("launches"),
    )


def _trace(
    model: nn.Module,
    run: Callable[[nn.Module, Tensor], Any],
    shape: tuple[int, int],
    *,
    blocks: Sequence[nn.Module],
    regions: Sequence[nn.Module],
    half: torch.dtype,
    autocast: torch.dtype | None,
) -> "_Trace":
    groups = Counter(_signature(block) for block in blocks)
    shown = blocks[: _enough(blocks, groups)]
    copies: dict[int, Any] = {}
    with _shortened(model, blocks, len(shown)):
        model = copy.deepcopy(model, copies)  # whatever it caches would be fake
    blocks, regions = ([copies[id(part)] for part in parts if id(part) in copies] for parts in (shown, regions))
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {f"model.{name}": _fake(tensor, half) for name, tensor in _named_tensors(model)}
        trace = _Trace(tensors.values(), blocks, regions, groups)
        ids = torch.zeros(shape, dtype=torch.int64)
        with trace.recording(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            torch.func.functional_call(_Run(model, run), tensors, (ids,))
    return trace


def _enough(blocks: Sequence[nn.Module], groups: Counter[Any]) -> int:
    """Return how many layers show each kind of them twice, if there are two: the first may keep what all share."""
    found: Counter[Any] = Counter()
    for number, block in enumerate(blocks):
        if all(found[signature] >= min(2, count) for signature, count in groups.items()):
            return number
        found[_signature(block)] += 1
    return len(blocks)


class _Run(nn.Module):
    """A model whose forward pass is a given function of it."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self._run = model, run

    def forward(self, ids: Tensor) -> Any:
        return self._run(self.model, ids)


class _Trace(TorchDispatchMode):
    """Counts what autograd keeps and what operations cost, by layer."""

    def __init__(
        self, tensors: Any, blocks: Sequence[nn.Module], regions: Sequence[nn.Module], groups: Counter[Any]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._groups = groups
        self._parameters = {_storage(tensor) for tensor in tensors}
        self._blocks, self._regions = blocks, regions
        self._layer = _OUTSIDE
        self._entered: list[set[int]] = []
        self._seen: dict[int, Any] = {}
        self._casts: set[int] = set()
        self._bytes: dict[tuple[int, str], Split] = defaultdict(Split)
        self._costs: Counter[tuple[int, str]] = Counter()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside."""
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.callback(block.register_forward_pre_hook(self._begin(index), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._end).remove)
            for region in self._regions:
                stack.callback(region.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(region.register_forward_hook(self._leave).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor))
            stack.enter_context(self)
            yield

    def _begin(self, index: int) -> Callable[..., None]:
        def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._layer = index
            self._add("inputs", _first_tensor(args, kwargs), "stream")

        return begin

    def _end(self, *_: Any) -> None:
        self._layer = _OUTSIDE

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._entered.append({_storage(_first_tensor(args, kwargs))})

    def _leave(self, *_: Any) -> None:
        self._entered.pop()

    def _save(self, tensor: Tensor) -> Tensor:
        place = _storage(tensor)
        if place not in self._parameters and place not in self._seen:
            self._seen[place] = tensor.untyped_storage()  # kept, so that no other gets its address
            self._add("saved", tensor, self._place_of(place))
            if place in self._casts:
                self._add("casts", tensor, self._place_of(place))
        return tensor.detach()

    def _place_of(self, storage: int) -> str:
        if not self._entered:
            return "stream"
        return "entered" if storage in self._entered[-1] else "inner"

    def _add(self, what: str, tensor: Tensor, place: str) -> None:
        size = tensor.untyped_storage().nbytes()
        self._bytes[self._layer, what] = self._bytes[self._layer, what].plus(Split(**{place: size}))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        several = result if isinstance(result, list | tuple) else (result,)
        results = [part for part in several if isinstance(part, Tensor)]
        operands = [part for part in args if isinstance(part, Tensor)]
        attends = name.startswith(_ATTENTION)
        if attends or func._overloadpacket in flop_registry:
            for part in results[: 2 if attends else 1]:
                self._add("products", part, self._place_of(0))
        if name.split(".")[0].lstrip("_") in _FREE:
            return result
        self._costs[self._layer, "launches"] += 1
        if not attends and func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            self._costs[self._layer, "matmul"] += flops
        elif not attends:
            self._costs[self._layer, "moved"] += sum(part.nbytes for part in (*operands, *results))
        if name == "_to_copy":
            self._note_cast(operands[0], results[0])
        return result

    def _note_cast(self, tensor: Tensor, cast: Tensor) -> None:
        if _storage(tensor) in self._parameters:
            self._casts.add(_storage(cast))
        elif self._entered and _storage(tensor) in self._entered[-1]:
            self._entered[-1].add(_storage(cast))

    @property
    def layers(self) -> list[tuple[LayerTrace, int]]:
        """The last layer of each kind, and the number of layers of that kind."""
        return [(self._of(index), self._groups[kind]) for kind, index in self._last().items()]

    @property
    def rest(self) -> LayerTrace:
        """Bytes kept outside of layers, and by earlier layers beyond what the last of their kind keep."""
        total = self._of(_OUTSIDE)
        last = self._last()
        for index, block in enumerate(self._blocks):
            total = total.plus(self._of(index)).plus(self._of(last[_signature(block)]), -1)
        return total

    def total(self, cost: str) -> float:
        """Return a cost of the whole forward pass.

        Args:
            cost: ``matmul``, ``moved`` or ``launches``.
        """
        inside = sum(self._groups[kind] * self._costs[index, cost] for kind, index in self._last().items())
        return float(self._costs[_OUTSIDE, cost] + inside)

    def _last(self) -> dict[Any, int]:
        return {_signature(block): index for index, block in enumerate(self._blocks)}

    def _of(self, layer: int) -> LayerTrace:
        kinds = ("saved", "inputs", "products", "casts")
        return LayerTrace(**{kind: self._bytes[layer, kind] for kind in kinds})


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """Return what tells layers apart that compute different things."""
    shapes = tuple((name, tuple(tensor.shape), tensor.requires_grad) for name, tensor in block.named_parameters())
    parts = tuple(repr(getattr(module, "part", None)) for module in block.modules() if hasattr(module, "part"))
    windows = tuple(getattr(module, "sliding_window", None) for module in block.modules())
    return type(block), shapes, parts, windows


@contextlib.contextmanager
def _shortened(model: nn.Module, blocks: Sequence[nn.Module], needed: int) -> Iterator[None]:
    """Leave out the layers after the first ``needed``, if all are of one list."""
    stack = next(
        (part for part in model.modules() if isinstance(part, nn.ModuleList) and list(part) == list(blocks)), None
    )
    if stack is None:
        yield
        return
    members = stack._modules
    stack._modules = {name: member for name, member in list(members.items())[:needed]}
    try:
        yield
    finally:
        stack._modules = members


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _fake(tensor: Tensor, half: torch.dtype) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=half if tensor.dtype == torch.bfloat16 else tensor.dtype)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return found
