"""Time and memory of the parts of a training step."""

import contextlib
import statistics
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_lm.callbacks.batches import num_predictions
from lightning_lm.callbacks.hooks import LeanHooks
from lightning_lm.callbacks.module_times import Ceilings, RoleTime, measure_ceilings, module_times, now
from lightning_lm.parts import Limit, check_numbers

__all__ = ["Profile"]

_PHASES = ("forward", "backward", "optimizer", "between batches")
_ROLE_STEPS = 2


class Profile(LeanHooks, Callback):
    """Times forward, backward and optimizer step, then prints where the time goes and how close it is to the roofline.

    It works in the first batches of a run: after a warm-up it times whole phases, waiting for the device at their ends;
    then, for two batches, every module (compiled ones run as they are written); then it records a trace of one batch.
    After that it does nothing.

    Written to the folder: ``trace.json`` for ui.perfetto.dev or chrome://tracing, in which the phases have their names,
    and on CUDA ``memory.pickle`` for pytorch.org/memory_viz.

    The phases add up to the time of a batch: with accumulation the optimizer's is divided over its batches, and the
    time between the end of one batch and the start of the next (data, other callbacks) is a phase of its own. The
    modules add up to forward and backward. The last of their rows is everything outside modules of a known kind: the
    loss, and the output projection if the loss takes hidden states; such a loss computes its gradients in its forward
    pass.

    The floor of a role is its roofline time: the larger of its matmul FLOPs at this device's measured matmul throughput
    and its operand bytes at the measured copy throughput; a backward pass counts as two forward ones. Roles with work
    that is not counted, such as attention scores, have none.

    Args:
        warmup: Number of batches before timing starts.
        steps: Number of batches whose phases are timed.
        folder: Output folder.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import Profile
        >>> trainer = Trainer(callbacks=[Profile()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, warmup: int = 5, steps: int = 10, folder: Path | str = "profile") -> None:
        check_numbers({"warmup": Limit.NON_NEGATIVE, "steps": Limit.COUNT}, {"warmup": warmup, "steps": steps})
        self._warmup, self._steps, self._folder = warmup, steps, Path(folder)
        self._reset()

    @property
    def num_batches(self) -> int:
        """Batches that it takes from the start of training until its table is printed."""
        return self._warmup + self._steps + _ROLE_STEPS + 1

    def _reset(self) -> None:
        self._times: dict[str, list[float]] = {name: [] for name in _PHASES}
        self._roles: dict[str, RoleTime] = {}
        self._whole = RoleTime()
        self._contexts, self._mark = contextlib.ExitStack(), contextlib.ExitStack()
        self._batch, self._start_s, self._end_s, self._stepping = 0, 0.0, 0.0, False
        self._tokens, self._role_tokens = 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, the timing of modules or the trace."""
        device = trainer.strategy.root_device
        if self._batch == self._warmup + self._steps:
            torch.compiler.set_stance("force_eager")
            self._roles = self._contexts.enter_context(module_times(pl_module, device))
        elif self._batch == self.num_batches - 1:
            self._record(device)
            self._name("forward")
        self._start_s = now(device) if self._batch < self.num_batches else 0.0
        if self._warmup <= self._batch < self._warmup + self._steps:
            self._tokens += num_predictions(batch)
            if self._batch:
                self._times["between batches"].append(self._start_s - self._end_s)
        elif self._batch < self.num_batches - 1:
            self._role_tokens += num_predictions(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """End the forward pass."""
        self._lap(trainer, "forward")
        self._name("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the backward pass."""
        self._lap(trainer, "backward")
        self._name("optimizer")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note that this batch ends with a step."""
        self._stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step; report after the last."""
        if self._stepping:
            self._lap(trainer, "optimizer")
        self._mark.close()
        self._stepping = False
        self._batch += 1
        self._end_s = now(trainer.strategy.root_device) if self._batch == self._warmup else self._start_s
        if self._batch == self._warmup + self._steps + _ROLE_STEPS:
            self._contexts.close()
            torch.compiler.set_stance("default")
        if self._batch == self.num_batches:
            self._contexts.close()
            if trainer.is_global_zero:
                rank_zero_info(self._report(trainer, pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take hooks off again."""
        self._mark.close()
        self._contexts.close()
        torch.compiler.set_stance("default")

    def _lap(self, trainer: Trainer, phase: str) -> None:
        if not self._warmup <= self._batch < self._warmup + self._steps + _ROLE_STEPS:
            return
        time_s = now(trainer.strategy.root_device)
        elapsed_s, self._start_s = time_s - self._start_s, time_s
        if self._batch < self._warmup + self._steps:
            self._times[phase].append(elapsed_s)
        elif phase == "forward":
            self._whole.forward_s += elapsed_s
        elif phase == "backward":
            self._whole.backward_s += elapsed_s

    def _name(self, phase: str) -> None:
        """Name what follows in the trace, if this is the batch that is traced."""
        self._mark.close()
        if self._batch == self.num_batches - 1:
            self._mark.enter_context(torch.profiler.record_function(phase))

    def _record(self, device: torch.device) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
            self._contexts.callback(torch.cuda.memory._record_memory_history, enabled=None)
            self._contexts.callback(torch.cuda.memory._dump_snapshot, str(self._folder / "memory.pickle"))
        profiler = torch.profiler.profile(activities=activities)
        self._contexts.callback(lambda: profiler.export_chrome_trace(str(self._folder / "trace.json")))
        self._contexts.enter_context(profiler)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> str:
        device = trainer.strategy.root_device
        half = "bf16" in str(trainer.precision) or next(pl_module.parameters()).dtype == torch.bfloat16
        ceilings = measure_ceilings(device, torch.bfloat16 if half else torch.float32)
        rest = "loss, the rest" if "head" in self._roles else "head, loss, the rest"
        lines = [
            f"Profile of {self._steps} batches after {self._warmup}, on {device}: a product of large matrices does "
            f"{ceilings.flops_per_s / 1e12:.3g} TFLOP/s, a large copy {ceilings.bytes_per_s / 1e9:.3g} GB/s.",
            *_phases_table(self._times, self._steps, self._tokens),
            "",
            *_roles_table(self._roles | {rest: self._unaccounted(pl_module)}, ceilings),
            f"Trace: {self._folder.resolve() / 'trace.json'}, for ui.perfetto.dev or chrome://tracing",
        ]
        if device.type == "cuda":
            lines.append(f"Memory: {self._folder.resolve() / 'memory.pickle'}, for pytorch.org/memory_viz")
        return "\n".join(lines)

    def _unaccounted(self, pl_module: LightningModule) -> RoleTime:
        """Return the time of no role; the head's product is known also where the loss takes it over."""
        forward_s = self._whole.forward_s - sum(role.forward_s for role in self._roles.values())
        backward_s = self._whole.backward_s - sum(role.backward_s for role in self._roles.values())
        rest = RoleTime(forward_s=max(forward_s, 0.0), backward_s=max(backward_s, 0.0))
        weight = getattr(getattr(getattr(pl_module, "model", None), "head", None), "weight", None)
        if "head" not in self._roles and isinstance(weight, Tensor):
            rest.flops = 2.0 * self._role_tokens * weight.numel()
        return rest


def _phases_table(times: dict[str, list[float]], batches: int, tokens: int) -> list[str]:
    """Return one line a phase and their sum, per batch; the spread is that of single phases."""
    lines = [f"{'phase':<28}{'mean':>10}{'spread':>10}{'share':>8}"]
    means = {name: sum(values) / batches for name, values in times.items() if values}
    whole = sum(means.values())
    for name, mean in means.items():
        spread = statistics.pstdev(times[name])
        lines.append(f"{name:<28}{mean * 1e3:>7.2f} ms{spread * 1e3:>7.2f} ms{mean / whole:>8.0%}")
    speed = f"  {tokens / batches / whole:,.0f} tokens/s on this device" if tokens else ""
    return [*lines, f"{'a batch':<28}{whole * 1e3:>7.2f} ms{'':>10}{1:>8.0%}{speed}"]


def _roles_table(roles: dict[str, RoleTime], ceilings: Ceilings) -> list[str]:
    """Return one line a role, the longest first. The clock between modules makes small models look slower."""
    lines = [f"{'modules':<28}{'forward':>10}{'backward':>10}{'share':>8}{'floor':>12}{'takes':>13}"]
    total = sum(role.forward_s + role.backward_s for role in roles.values()) or 1.0
    for name, role in sorted(roles.items(), key=lambda item: -item[1].forward_s - item[1].backward_s):
        spent, floor = role.forward_s + role.backward_s, ceilings.floor_s(role)
        ends = f"{floor / _ROLE_STEPS * 1e3:>9.2f} ms{spent / floor:>6.1f} floors" if floor else f"{'-':>12}{'-':>13}"
        forward, backward = (value / _ROLE_STEPS * 1e3 for value in (role.forward_s, role.backward_s))
        gradient = f"{backward:>7.2f} ms" if backward else f"{'-':>10}"
        lines.append(f"{name:<28}{forward:>7.2f} ms{gradient}{spent / total:>8.0%}{ends}")
    return lines
