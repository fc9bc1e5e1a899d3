"""Every strategy for a module on a number of GPUs: what it needs, how fast it is, or why it cannot be used."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from lightning_lm.cli.plan_module import Batch, PlannedCommandLine
from lightning_lm.errors import ConfigurationError
from lightning_lm.models import Transformer
from lightning_lm.models.attention import SelfAttention
from lightning_lm.models.summary import attention_shapes, flops_per_token, readable_bytes
from lightning_lm.modules import PretrainModule, SFTModule
from lightning_lm.modules.activation_checkpointing import blocks_of
from lightning_lm.protocols import is_language_model
from lightning_lm.scaling.gpus import Gpu
from lightning_lm.scaling.model_trace import ModelTrace, trace_model
from lightning_lm.scaling.training_memory import Layout, MemoryUse, StateBytes, Workload, memory_use
from lightning_lm.scaling.training_time import Collective, Rates, StepTime, communication, step_time
from lightning_lm.strategies.local_sizes import local_states, split_regions

__all__ = ["Candidate", "Cluster", "Planner", "best"]

_NEARLY = 0.97
"""A strategy that comes first in the list is preferred unless another is faster than this."""
_ADVICE = {
    "parameters": "more GPUs, or tensor parallelism",
    "gradients": "a strategy that shards them",
    "optimizer_states": "a strategy that shards them, or more GPUs",
    "activations": "--model.activation_checkpointing blocks, or fewer rows at once",
    "logits": "fewer rows at once",
    "buffers": "tensor parallelism",
}
_SHARDED = "--trainer.strategy ShardedModelStrategy"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs of a run.

    Args:
        gpu: Figures of each.
        gpus: Number of GPUs.
        gpus_per_node: GPUs of a machine.
        rates: Fractions of the figures that are reached.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    rates: Rates = Rates()

    @property
    def usable_bytes(self) -> float:
        """Memory of a GPU that a run can use."""
        return self.gpu.memory_bytes - self.rates.reserved_bytes


@dataclass(kw_only=True)
class Candidate:
    """A strategy, and what was found out about it.

    Args:
        name: Short name.
        words: Options that choose it.
        layout: Its parallelism.
        reason: Reason why it cannot be used; empty if it can.
        micro_batch: Rows, pairs or prompts of a micro-batch on a data-parallel rank.
        micro_batches: ``accumulate_grad_batches``.
        memory: Memory of the GPU that has the least left.
        exchanged: Communication of a step.
        time: Duration of a step.
    """

    name: str
    words: str
    layout: Layout
    reason: str = ""
    micro_batch: int = 0
    micro_batches: int = 0
    memory: MemoryUse | None = None
    exchanged: list[Collective] = field(default_factory=list)
    time: StepTime | None = None


class Planner:
    """Evaluates strategies for the module of a command line.

    Args:
        line: Has the module on the meta device.
        cluster: GPUs of the run.
        batch: Rows of an optimizer step.
    """

    def __init__(self, line: PlannedCommandLine, cluster: Cluster, batch: Batch) -> None:
        self.line, self.cluster = line, cluster
        self.batch, self.objective = batch, line.objective
        self.precision = str(line.settings.trainer.precision)
        self.model = line.language_model
        self.optimizer = line.module.build_optimizer()
        self.trace = self._trace()
        self.peak = cluster.gpu.flops_per_s(self.precision)

    def _trace(self) -> ModelTrace:
        try:
            regions = split_regions(self.model)
        except ConfigurationError:  # said where a strategy needs it
            regions = []
        autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        return trace_model(
            self.model,
            self.line.forward,
            context_length=self.batch.context_length,
            blocks=list(blocks_of(self.model)),
            regions=regions,
            autocast=autocast,
        )

    def plan(self) -> list[Candidate]:
        """Return every strategy, the simplest first."""
        return [self._evaluated(candidate) for candidate in self._candidates()]

    def _candidates(self) -> Iterator[Candidate]:
        gpus, node = self.cluster.gpus, self.cluster.gpus_per_node
        if gpus == 1:
            yield Candidate(name="one GPU", words="--trainer.devices 1", layout=Layout(gpus_per_node=node))
            return
        plain = Layout(data=gpus, gpus_per_node=node)
        yield Candidate(name="ddp", words="--trainer.strategy ddp", layout=replace(plain, bucket_copy=True))
        for stage in (1, 2):
            words = f"--trainer.strategy zero{stage}"
            yield Candidate(name=f"zero{stage}", words=words, layout=replace(plain, zero_stage=stage))
        sharded = replace(plain, zero_stage=3)
        yield Candidate(name="fsdp2", words="--trainer.strategy fsdp2", layout=sharded)
        yield Candidate(
            name="fsdp2, kept",
            words=f"{_SHARDED} --trainer.strategy.reshard_after_forward false",
            layout=replace(sharded, reshard_after_forward=False),
        )
        for size in (2, 4, 8):
            if gpus % size == 0 and node % size == 0:
                yield Candidate(
                    name=f"fsdp2 x tp{size}" if gpus > size else f"tp{size}",
                    words=f"{_SHARDED} --trainer.strategy.tensor_parallel_size {size} "
                    "--trainer.strategy.sequence_parallel true",
                    layout=replace(sharded, data=gpus // size, tensor=size, sequence_parallel=True),
                )
        for size in (2, 8):
            if gpus % size == 0 and node % size == 0:
                yield Candidate(
                    name=f"ddp x cp{size}" if gpus > size else f"cp{size}",
                    words=f"--trainer.strategy ContextParallelStrategy --trainer.strategy.context_parallel_size {size}",
                    layout=replace(plain, data=gpus // size, context=size, bucket_copy=True),
                )

    def _evaluated(self, candidate: Candidate) -> Candidate:
        layout = candidate.layout
        candidate.reason = self._refusal(layout)
        if candidate.reason:
            return candidate
        try:
            states = local_states(self.line.module, self.optimizer, layout)
        except ConfigurationError as error:
            candidate.reason = str(error)
            return candidate
        rows = self.batch.examples // layout.data
        least = self.line.settings.trainer.accumulate_grad_batches
        tried = [number for number in range(least, rows + 1) if rows % number == 0] or [rows]
        options = [(number, memory_use(self._work(rows // number, number), layout, states)) for number in tried]
        fitting = [option for option in options if option[1].total <= self.cluster.usable_bytes]
        number, memory = next(iter(fitting), None) or min(options, key=lambda option: option[1].total)
        candidate.micro_batch, candidate.micro_batches, candidate.memory = rows // number, number, memory
        if not fitting:
            candidate.reason = self._too_large(memory)
        work = self._work(candidate.micro_batch, number)
        candidate.exchanged = communication(work, layout)
        candidate.time = step_time(work, layout, self.cluster.gpu, self.cluster.rates, peak=self.peak, states=states)
        return candidate

    def _refusal(self, layout: Layout) -> str:
        examples, module = self.batch.examples, self.line.module
        if examples % layout.data:
            multiple = math.ceil(examples / layout.data) * layout.data
            return f"a batch of {examples} cannot be dealt out to {layout.data} ranks; for example --batch {multiple}"
        if self.precision == "16-mixed" and layout.zero_stage >= 2:
            return "16-mixed needs all gradients on each rank; use --precision bf16-mixed"
        if layout.context > 1:
            attends = all(isinstance(getattr(block, "mixer", None), SelfAttention) for block in blocks_of(self.model))
            if not isinstance(module, PretrainModule | SFTModule) or not (
                isinstance(self.model, Transformer) and attends
            ):
                return "only for PretrainModule and SFTModule, and layers of Attention"
        return ""

    def _too_large(self, memory: MemoryUse) -> str:
        name, size = max(memory._asdict().items(), key=lambda item: item[1])
        total, usable = (readable_bytes(round(number)) for number in (memory.total, self.cluster.usable_bytes))
        what, advice = name.replace("_", " "), _ADVICE[name]
        if name == "activations" and self.line.checkpointing == "blocks":
            casts = "--precision bf16-true, which casts no weights, or " if "mixed" in self.precision else ""
            advice = f"{casts}tensor parallelism"
        return f"{total} of {usable}, {what} alone {readable_bytes(round(size))}: {advice}"

    def _work(self, micro_batch: int, micro_batches: int) -> Workload:
        """Return the work of a rank whose micro-batches have a number of examples."""
        rows = math.ceil(micro_batch * self.objective.rows_per_example)
        return replace(self._row, rows=rows, micro_batches=micro_batches)

    @cached_property
    def _row(self) -> Workload:
        """The work of one row."""
        module, model, trace = self.line.module, self.model, self.trace
        parameters = list(module.parameters())
        blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks_of(model)]
        trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
        whole = sum(parameter.nbytes for parameter in parameters)
        length = self.batch.context_length
        head: Any = model.head.weight if is_language_model(model) else None
        shapes = attention_shapes(model)
        own = sum(parameter.nbytes for parameter in model.parameters())
        backward = 2.0 if trained > own / 2 else 1.0  # frozen weights need no gradients of their own
        return Workload(
            trace=trace,
            whole=StateBytes(whole, trained, 2 * trained),
            block_bytes=max(blocks, default=0),
            root_bytes=own - sum(blocks),
            num_layers=len(blocks),
            d_model=0 if head is None else head.shape[1],
            vocab_size=0 if head is None or not self.objective.has_logits else head.shape[0],
            rows=1,
            micro_batches=1,
            element_bytes=2 if "16" in self.precision else 4,
            model_flops=flops_per_token(model, length) * length * (1 + backward) / 3,
            attention_flops=sum(4.0 * shape.width * shape.keys(length) for shape in shapes) * length,
            backward=backward,
            forward_only=self.objective.forward_only,
            checkpointing=self.line.checkpointing,
            fused_loss=is_language_model(model),
            kv_bytes=2.0 * self._kv_width() * length * (2 if "16" in self.precision else 4),
        )

    def _kv_width(self) -> int:
        parts = [module for module in self.model.modules() if isinstance(module, SelfAttention)]
        return parts[0].num_kv_heads * parts[0].head_dim if parts else 0


def best(candidates: list[Candidate]) -> Candidate | None:
    """Return the fastest strategy that fits; of nearly equal ones the simplest.

    Args:
        candidates: Result of `Planner.plan`.
    """
    fitting = [candidate for candidate in candidates if not candidate.reason and candidate.time is not None]
    fastest = max((candidate.time.tokens_per_s for candidate in fitting if candidate.time), default=0.0)
    return next((one for one in fitting if one.time and one.time.tokens_per_s >= _NEARLY * fastest), None)
