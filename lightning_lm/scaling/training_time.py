r"""Communication and time of a training step on many GPUs, as functions of sizes.

* Communication. A ring of :math:`N` ranks sends :math:`2 (N - 1) / N` times the size of an all-reduced tensor, and half
  as much for an all-gather or a reduce-scatter. Of a group with :math:`g` ranks on each machine the slowest hop is the
  smaller of a GPU's link and :math:`g` times its part of the network.
* Computation. Matmuls take their FLOPs at a fraction of the peak, attention its causal half at a smaller one, and all
  other operations their bytes at a fraction of the memory's bandwidth. The backward pass costs twice the forward pass,
  and recomputation one forward pass more.
* Both. What overlaps with computation counts only as far as it takes longer. A pipeline of :math:`p` stages with
  :math:`v` parts each idles for :math:`(p - 1) / (v m)` of its work on :math:`m` micro-batches.

What was simplified: one latency for all collectives, no stragglers, and communication does not slow computation down.
`EAGER` and `COMPILED` were chosen between published speeds of one model with and without torch.compile (torchtitan,
Llama 3.1 8B on eight H100); the test of this module compares the result with other published runs.

Source:
    Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 7; Korthikanti et al. 2022, arXiv:2205.05198, section 4;
    Narayanan et al. 2021, arXiv:2104.04473, section 2.2; Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_lm.parts import Limit, check_numbers
from lightning_lm.scaling.gpus import Gpu
from lightning_lm.scaling.training_memory import Layout, StateBytes, Workload, sharded_states

__all__ = ["COMPILED", "EAGER", "Collective", "Rates", "StepTime", "communication", "step_time"]

_BUCKET_BYTES = 25 * 2**20
EAGER, COMPILED = 0.7, 0.4
"""Fraction of the bytes of elementwise operations that reach the memory: caches keep some, fusion saves more."""


# --- communication ---


class Collective(NamedTuple):
    """One kind of communication of an optimizer step."""

    name: str
    sent_bytes: float
    """Bytes that each rank sends."""
    ranks: int
    """Size of the group."""
    ranks_per_node: int
    """Ranks of the group on one machine."""
    overlaps: Literal["step", "backward", "nothing"]
    """Computation that goes on meanwhile."""
    calls: float = 1.0
    """Number of collectives that it is cut into."""


def communication(work: Workload, layout: Layout) -> list[Collective]:
    """Return what a rank exchanges in an optimizer step.

    Args:
        work: Model and rows.
        layout: Parallelism.
    """
    found = [*_over_data(work, layout), *_over_tensor(work, layout), *_over_context(work, layout)]
    if layout.pipeline > 1:
        neighbours = 2 * work.tokens / layout.context * work.d_model * work.element_bytes * work.micro_batches
        shards = layout.tensor if layout.sequence_parallel else 1
        found.append(Collective("point-to-point of stages", neighbours / shards, 2, 1, "step"))
    return [one for one in found if one.ranks > 1]


def _over_data(work: Workload, layout: Layout) -> list[Collective]:
    ranks, model = layout.data * layout.context, layout.tensor * layout.pipeline
    per_node = max(1, min(ranks, layout.gpus_per_node // min(layout.tensor, layout.gpus_per_node)))
    ring = (ranks - 1) / ranks
    gradients, parameters = ring * work.whole.gradients / model, ring * work.whole.parameters / model
    units = work.num_layers / layout.pipeline + 1
    buckets = 1 + work.whole.gradients / model / _BUCKET_BYTES
    if layout.zero_stage == 3:
        gathers = work.micro_batches * (2 if layout.reshard_after_forward else 1)
        return [
            Collective("all-gather of parameters", gathers * parameters, ranks, per_node, "step", gathers * units),
            Collective("reduce-scatter of gradients", gradients, ranks, per_node, "backward", units),
        ]
    updated = Collective("broadcast of parameters", gradients, ranks, per_node, "nothing", buckets)
    if layout.zero_stage == 2:
        return [Collective("reduce of gradients", gradients, ranks, per_node, "backward", buckets), updated]
    reduced = Collective("all-reduce of gradients", 2 * gradients, ranks, per_node, "backward", buckets)
    return [reduced, updated] if layout.zero_stage == 1 else [reduced]


def _over_tensor(work: Workload, layout: Layout) -> list[Collective]:
    """Two all-reduces of the stream in each layer's forward pass and two in its backward pass, or as much by halves."""
    ranks = layout.tensor
    passes = 4 + (2 if work.checkpointing == "blocks" else 0) + 2 * work.forward_only
    stream = work.tokens / layout.context * work.d_model * work.element_bytes
    layers = passes * work.num_layers / layout.pipeline + 4  # embedding and head once each, forward and backward
    sent = 2 * (ranks - 1) / ranks * stream * layers * work.micro_batches
    per_node = min(ranks, layout.gpus_per_node)
    return [Collective("all-reduce of activations", sent, ranks, per_node, "nothing", layers * work.micro_batches)]


def _over_context(work: Workload, layout: Layout) -> list[Collective]:
    """An all-gather of keys and values forward, one more and a reduce-scatter backward."""
    ranks = layout.context
    passes = 3 + (1 if work.checkpointing == "blocks" else 0) + work.forward_only
    calls = passes * work.micro_batches * work.num_layers / layout.pipeline
    sent = (ranks - 1) / ranks * work.rows * work.kv_bytes / layout.tensor * calls
    per_node = max(1, min(ranks, layout.gpus_per_node // min(layout.tensor, layout.gpus_per_node)))
    return [Collective("all-gather of keys and values", sent, ranks, per_node, "nothing", calls)]


# --- time ---


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Fractions of a data sheet's figures that programs reach.

    Args:
        matmul: Matmuls of a training step, of the peak FLOP/s.
        attention: Fused causal attention, of the peak FLOP/s.
        memory: Elementwise operations, of the memory's bandwidth.
        link: Collectives, of the bandwidth of links and network.
        fused: Fraction of the elementwise operations' bytes that reach the memory: `EAGER` or `COMPILED`.
        whole_step: Fraction of the peak FLOP/s that a step reaches on one GPU, measured (MFU); replaces all before.
        launch_s: Time in which Python and CUDA start one operation; hidden by longer ones.
        latency_s: Time that a collective takes however small it is.
        reserved_bytes: Memory of a GPU that CUDA and NCCL take, and fragmentation wastes.
    """

    matmul: float = 0.7
    attention: float = 0.4
    memory: float = 0.8
    link: float = 0.75
    fused: float = EAGER
    whole_step: float | None = None
    launch_s: float = 5e-6
    latency_s: float = 20e-6
    reserved_bytes: float = 2 * 2**30

    def __post_init__(self) -> None:
        fractions = {
            name: value for name, value in vars(self).items() if name != "reserved_bytes" and value is not None
        }
        check_numbers(dict.fromkeys(fractions, Limit.FRACTION), fractions)
        check_numbers(dict.fromkeys(fractions, Limit.POSITIVE), fractions)


class StepTime(NamedTuple):
    """Seconds of an optimizer step, and the speed that follows."""

    compute_s: float
    optimizer_s: float
    communication_s: float
    exposed_s: float
    """Communication that nothing hides."""
    bubble_s: float
    """A pipeline's idle time."""
    tokens_per_s: float
    """Over all GPUs."""
    mfu: float
    """Model FLOPs utilization."""

    @property
    def step_s(self) -> float:
        """Whole step."""
        return self.compute_s + self.optimizer_s + self.exposed_s + self.bubble_s


def step_time(
    work: Workload,
    layout: Layout,
    gpu: Gpu,
    rates: Rates,
    *,
    peak: float | None = None,
    states: StateBytes | None = None,
) -> StepTime:
    """Return how long an optimizer step takes.

    Args:
        work: Model and rows.
        layout: Parallelism.
        gpu: Figures of the GPU.
        rates: Fractions of them that are reached.
        peak: FLOP/s in the run's precision; by default that of 16-bit floats.
        states: Bytes that a rank keeps; by default an even part of the whole.
    """
    peak = gpu.half_flops_per_s if peak is None else peak
    compute = _compute_s(work, layout, gpu, rates, peak) * work.micro_batches
    states = sharded_states(work.whole, layout) if states is None else states
    touched = 3 * states.optimizer_states + 2 * states.gradients  # states read and written, and what goes with them
    optimizer = touched / (gpu.memory_bytes_per_s * rates.memory)
    found = communication(work, layout)
    times = [one.sent_bytes / (_bandwidth(one, gpu) * rates.link) + one.calls * rates.latency_s for one in found]
    hidden_by = {"step": compute, "backward": compute / work.micro_batches * 2 / 3, "nothing": 0.0}
    exposed = _exposed(found, times, hidden_by)
    bubble = (layout.pipeline - 1) / (layout.virtual_stages * work.micro_batches) * (compute + exposed)
    step = compute + optimizer + exposed + bubble
    rows = work.rows * work.micro_batches * layout.data
    speed = rows * work.trace.context_length / step
    mfu = rows * work.model_flops / (step * layout.ranks * peak)
    return StepTime(compute, optimizer, sum(times), exposed, bubble, speed, mfu)


def _compute_s(work: Workload, layout: Layout, gpu: Gpu, rates: Rates, peak: float) -> float:
    """Return the seconds of one micro-batch's forward and backward pass on a rank."""
    ranks = layout.tensor * layout.context * layout.pipeline
    if rates.whole_step is not None:
        return work.rows * work.model_flops / (peak * rates.whole_step * ranks)
    again = {"none": 0.0, "ops": 0.0, "blocks": 1.0}[work.checkpointing] + work.forward_only
    passes = 1 + work.backward + again
    head = 2.0 * work.trace.context_length * work.d_model * work.vocab_size
    matmul = work.trace.matmul_flops * passes + head * (1 + work.backward + work.forward_only)
    attention = work.attention_flops / 2 * (3.5 + again)  # the backward pass computes the scores again
    moved = work.trace.moved_bytes * rates.fused * (passes + (work.checkpointing == "ops"))
    seconds = matmul / (peak * rates.matmul) + attention / (peak * rates.attention)
    seconds = work.rows / ranks * (seconds + moved / (gpu.memory_bytes_per_s * rates.memory))
    return max(seconds, work.trace.launches / layout.pipeline * rates.fused * passes * rates.launch_s)


def _bandwidth(collective: Collective, gpu: Gpu) -> float:
    """Return the bandwidth of a ring's slowest hop."""
    if collective.ranks <= collective.ranks_per_node:
        return gpu.link_bytes_per_s
    return min(gpu.link_bytes_per_s, collective.ranks_per_node * gpu.network_bytes_per_s)


def _exposed(found: Sequence[Collective], times: Sequence[float], hidden_by: dict[str, float]) -> float:
    """Return what communication takes beyond the computation that it overlaps with."""
    waiting = {name: 0.0 for name in hidden_by}
    for one, seconds in zip(found, times, strict=True):
        waiting[one.overlaps] += seconds
    backward = max(0.0, waiting["backward"] - hidden_by["backward"])
    both = max(backward, waiting["backward"] + waiting["step"] - hidden_by["step"])
    return waiting["nothing"] + both
