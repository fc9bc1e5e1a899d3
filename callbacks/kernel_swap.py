"""Fused kernels in any model, by exchanging methods of its layers while it trains."""

import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels.runtime.backend import unavailable
from lightning_lm.kernels.swap.swap import Swapped, last_call, restore, swap

__all__ = ["KernelSwap"]

_IDLE = "its method was not called; the model computes this elsewhere, or skipped it in this batch"


class KernelSwap(Callback):
    """Swaps layers of any model for fused kernels: norms, feed-forward layers, RoPE and causal attention.

    Layers are recognised by their parts, whether they are from this package, from ``transformers`` or a user's own.
    Before a layer is swapped, the kernel's output and gradients are checked against the layer itself and a float64
    reference on random inputs. Layers without a matching kernel stay as they are; a table lists both, with reasons.
    Only the forward methods of instances are replaced, after the module has built its model and before a strategy
    wraps it, and restored at the end: parameters, names and classes stay as they are. Without a GPU or Triton the same
    operations run in torch, as the table shows.

    A swapped layer may still be called in a way that its kernel does not support, such as attention with a mask: such
    calls run the layer's own method. After the first training batch, or the first of a validation or test without
    training, the callback reports whether all kernels ran, and warns about layers that fell back or were not called.

    Under ``bf16-mixed`` a norm returns the type of its input, also where ``transformers`` would return float32 for a
    layer that rounds it at once.

    Args:
        include: Patterns of paths of layers to swap, such as ``model.layers.*.mlp``.
        exclude: Patterns of paths of layers to leave as they are.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import KernelSwap
        >>> trainer = Trainer(callbacks=[KernelSwap()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> None:
        self._include, self._exclude = tuple(include), tuple(exclude)
        self._swapped: list[Swapped] = []
        self._replaced: dict[str, Any] | None = None
        self._reported = False

    @property
    def swapped(self) -> list[Swapped]:
        """Outcome of the swap for each layer of a known kind, swapped or not."""
        return list(self._swapped)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See to it that the layers are exchanged as soon as the module has built its model."""
        if self._replaced is not None:
            return
        build = pl_module.configure_model

        def configure_model() -> None:
            build()
            self._exchange(trainer, pl_module)

        before = vars(pl_module)
        self._replaced = {"configure_model": before["configure_model"]} if "configure_model" in before else {}
        vars(pl_module)["configure_model"] = configure_model

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report which kernels ran."""
        self._report(pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Report which kernels ran, if nothing is trained."""
        if not trainer.training and not trainer.sanity_checking:
            self._report(pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Report which kernels ran."""
        self._report(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        self._restore(pl_module)

    def _exchange(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange what is new.

        Raises:
            ConfigurationError: If nothing at all is exchanged.
        """
        device = trainer.strategy.root_device
        new = swap(pl_module, include=self._include, exclude=self._exclude, device=device)
        known = {(id(entry.layer), entry.method) for entry in self._swapped}
        new = [entry for entry in new if (id(entry.layer), entry.method) not in known]
        self._swapped += new
        if not any(entry.kernel for entry in self._swapped):
            raise ConfigurationError(_nothing(self._swapped, pl_module))
        if new:
            rank_zero_info(_table(new, unavailable(device)))

    def _report(self, pl_module: LightningModule) -> None:
        if self._reported:
            return
        self._reported = True
        present = {id(layer) for layer in pl_module.modules()}
        swapped = [entry for entry in self._swapped if entry.kernel and id(entry.layer) in present]
        idle = [entry._replace(reason=_IDLE) for entry in swapped if last_call(entry) is None]
        idle += [entry._replace(reason=reason) for entry in swapped if (reason := last_call(entry))]
        if idle:
            title = f"{len(idle)} of {len(swapped)} swapped layers did not run their kernels in the first batch:"
            rank_zero_warn("\n".join([title, *_lines(idle)]))
        else:
            rank_zero_info(f"All {len(swapped)} swapped layers ran their kernels in the first batch.")

    def _restore(self, pl_module: LightningModule) -> None:
        restore(self._swapped)
        self._swapped, self._reported = [], False
        if self._replaced is not None:
            vars(pl_module).pop("configure_model", None)
            vars(pl_module).update(self._replaced)
            self._replaced = None


def _table(entries: Sequence[Swapped], no_triton: str | None) -> str:
    backend = "Triton" if no_triton is None else f"torch ({no_triton})"
    return "\n".join([f"Kernels exchanged; they run in {backend}.", *_lines(entries)])


def _lines(entries: Sequence[Swapped]) -> list[str]:
    """Return one line for each kind of layer and outcome; numbers in paths become stars."""
    lines: dict[tuple[str, ...], int] = {}
    for entry in entries:
        path = re.sub(r"\b\d+\b", "*", entry.module) or "(the model)"
        row = (path, entry.kind, entry.kernel or "-", entry.reason)
        lines[row] = lines.get(row, 0) + 1
    rows = [("layer", "number", "class", "kernel", "why not")]
    rows += [(path, str(number), kind, kernel, reason) for (path, kind, kernel, reason), number in lines.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows]


def _nothing(entries: Sequence[Swapped], pl_module: LightningModule) -> str:
    reasons = "; ".join(f"{entry.module}: {entry.reason}" for entry in entries[:4])
    why = f"Of {len(entries)} layers none was exchanged: {reasons}." if entries else "It has no layer of a known kind."
    return (
        f"KernelSwap found nothing to exchange in {type(pl_module).__name__}. {why} Change include or exclude, or "
        "leave KernelSwap out."
    )
