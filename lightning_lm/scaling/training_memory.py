r"""Memory of a training step on each of many GPUs, as functions of sizes.

ZeRO stage 1 divides optimizer states by the data-parallel ranks, stage 2 also gradients, stage 3 also parameters;
tensor and pipeline parallelism divide all three. Activations come from `model_trace`: tensor parallelism divides those
inside of its regions, and sequence parallelism also the residual stream between them.

What was simplified: no fragmentation of memory, and of CUDA and NCCL only the reserve that `Rates` sets aside.

Source:
    Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, figure 1 and section 5; Korthikanti et al. 2022, arXiv:2205.05198,
    table 2; stages of a pipeline: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
"""

from dataclasses import dataclass
from typing import NamedTuple

from lightning_lm.scaling.model_trace import Checkpointing, ModelTrace

__all__ = ["Layout", "MemoryUse", "StateBytes", "Workload", "kept_by_loss", "memory_use", "sharded_states"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallelism of a run; neighbouring ranks share a tensor-parallel group, then a context, then a pipeline.

    Args:
        data: Ranks that read different rows.
        tensor: Ranks that split each matrix.
        context: Ranks that split each row.
        pipeline: Stages.
        zero_stage: 0 replicates everything over the data axis, 1 shards optimizer states, 2 also gradients, 3 also
            parameters.
        sequence_parallel: Tensor parallelism also shards the residual stream.
        reshard_after_forward: With stage 3, gather parameters once more for the backward pass.
        bucket_copy: Gradients are copied to the buckets of DDP instead of being views of them.
        virtual_stages: Parts of the model that each stage has, for an interleaved pipeline.
        gpus_per_node: GPUs of a machine.
    """

    data: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    zero_stage: int = 0
    sequence_parallel: bool = False
    reshard_after_forward: bool = True
    bucket_copy: bool = False
    virtual_stages: int = 1
    gpus_per_node: int = 8

    @property
    def ranks(self) -> int:
        """All GPUs."""
        return self.data * self.tensor * self.context * self.pipeline


class StateBytes(NamedTuple):
    """Bytes that one rank keeps between steps."""

    parameters: float
    gradients: float
    optimizer_states: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with its objective, and the rows of a step on one data-parallel rank.

    Args:
        trace: Forward pass of one row.
        whole: Parameters, gradients and optimizer states of one GPU alone, without any sharding.
        block_bytes: Parameters of the largest layer.
        root_bytes: Parameters outside of layers: embedding and head.
        num_layers: Number of layers.
        d_model: Width of the residual stream.
        vocab_size: Rows of the output layer; 0 without one.
        rows: Rows of a micro-batch, both completions of a pair counted.
        micro_batches: Micro-batches of an optimizer step.
        element_bytes: Bytes of an activation.
        model_flops: Training FLOPs of one row by the convention of MFU: no recomputation, all pairs of tokens.
        attention_flops: FLOPs of attention in the forward pass of one row, all pairs of tokens.
        backward: Cost of the backward pass in forward passes: 2, or 1 if nearly all weights are frozen.
        forward_only: Forward passes of further models, such as a reference, for each forward pass of the trained one.
        checkpointing: Activations that are recomputed.
        fused_loss: The loss never holds all logits.
        kv_bytes: Keys and values of one row in one layer.
    """

    trace: ModelTrace
    whole: StateBytes
    block_bytes: float
    root_bytes: float
    num_layers: int
    d_model: int
    vocab_size: int
    rows: int
    micro_batches: int
    element_bytes: int
    model_flops: float
    attention_flops: float
    backward: float = 2.0
    forward_only: float = 0.0
    checkpointing: Checkpointing = "none"
    fused_loss: bool = True
    kv_bytes: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one data-parallel rank."""
        return self.rows * self.trace.context_length


# --- memory ---


class MemoryUse(NamedTuple):
    """Bytes on one GPU at the peak of a step."""

    parameters: float
    gradients: float
    optimizer_states: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """The sum of all."""
        return sum(self)


LOGITS_BUDGET = 512 * 2**20
"""Logits that a fused loss holds at once on a GPU, with all temporary matrices."""


def sharded_states(whole: StateBytes, layout: Layout) -> StateBytes:
    """Return what each rank keeps if everything divides evenly; real ranks keep a little more.

    Args:
        whole: Bytes without sharding.
        layout: Parallelism.

    Source:
        Rajbhandari et al. 2020, arXiv:1910.02054, section 5.
    """
    model = layout.tensor * layout.pipeline
    divisors = [model * (layout.data * layout.context if layout.zero_stage >= stage else 1) for stage in (3, 2, 1)]
    return StateBytes(*(size / divisor for size, divisor in zip(whole, divisors, strict=True)))


def memory_use(work: Workload, layout: Layout, states: StateBytes | None = None) -> MemoryUse:
    """Return the memory of one GPU.

    Gradients that accumulate over micro-batches are whole under ZeRO stages 2 and 3 too, because they are reduced at
    the end of the step only. A pipeline keeps the activations of as many micro-batches as it has stages (1F1B).

    Args:
        work: Model and rows.
        layout: Parallelism.
        states: Bytes that a rank keeps; by default an even part of the whole.
    """
    states = sharded_states(work.whole, layout) if states is None else states
    model = layout.tensor * layout.pipeline
    accumulates = work.micro_batches > 1 and layout.pipeline == 1
    gradients = work.whole.gradients / model if accumulates and layout.zero_stage >= 2 else states.gradients
    row = work.trace.activation_bytes(
        work.checkpointing,
        rows=work.rows,
        tensor=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
    )
    waiting = min(layout.pipeline, work.micro_batches)
    activations = row / layout.context * waiting / layout.pipeline
    return MemoryUse(
        parameters=states.parameters,
        gradients=gradients,
        optimizer_states=states.optimizer_states,
        activations=activations,
        logits=_logits_bytes(work, layout),
        buffers=_buffer_bytes(work, layout),
    )


def kept_by_loss(work: Workload, layout: Layout) -> float:
    """Return the gradients that a fused loss computes in its forward pass: of hidden states, and float32 of the weight.

    Args:
        work: Model and rows.
        layout: Parallelism.
    """
    if not work.vocab_size or not work.fused_loss:
        return 0.0
    hidden = work.tokens / layout.context * work.d_model * work.element_bytes
    return hidden + 4.0 * work.vocab_size * work.d_model / layout.tensor


def _logits_bytes(work: Workload, layout: Layout) -> float:
    """Return what the loss holds; without fusion logits, their float32 copy and their gradient."""
    logits = work.tokens / layout.context * work.vocab_size / layout.tensor
    if not work.fused_loss:
        return logits * ((work.element_bytes if work.element_bytes < 4 else 0) + 8.0)
    return kept_by_loss(work, layout) + min(LOGITS_BUDGET, logits * (work.element_bytes + 24.0))


def _buffer_bytes(work: Workload, layout: Layout) -> float:
    """Return gathered parameters and unsharded gradients of the layers that are at work, or the buckets of DDP."""
    model = layout.tensor * layout.pipeline
    if layout.bucket_copy and layout.ranks > 1:
        return work.whole.gradients / model
    if layout.zero_stage < 3 or layout.data == 1:
        return 0.0
    trained = work.whole.gradients / max(work.whole.parameters, 1.0)
    gathered = 2 * work.block_bytes + work.root_bytes if layout.reshard_after_forward else work.whole.parameters
    reduced = 0.0 if work.micro_batches > 1 else trained * max(work.root_bytes, 2 * work.block_bytes)
    return (gathered + reduced) / model
