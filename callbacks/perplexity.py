"""Exact loss, perplexity and bits per byte of an evaluation, whatever its batches and ranks look like."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lm.callbacks.batches import field_of, logits_in, logits_of, shifted_targets
from lightning_lm.callbacks.hooks import Attempt, LeanHooks, reason_of
from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import Tokenizer
from lightning_lm.types import IGNORE_INDEX

__all__ = ["Perplexity"]

_LARGEST_EXPONENT = 709.0
"""Beyond it the exponential of a float64 overflows."""
_CHUNK = 2048
"""Positions whose logits are held in float32 at once."""


class _Sums(NamedTuple):
    nll: Tensor
    """Nats, float64."""
    tokens: Tensor
    """Targets, int64."""
    num_bytes: Tensor
    """UTF-8 bytes of the targets, int64; 0 without a tokenizer."""

    def plus(self, other: "_Sums") -> "_Sums":
        """Add out of place: sums made under inference mode may not be updated in place outside it."""
        return _Sums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class _Totals(NamedTuple):
    nll: float
    tokens: int
    num_bytes: int

    def metrics(self) -> dict[str, float]:
        """Return what can be said: nothing of no token, and nothing of bytes without a tokenizer."""
        if not self.tokens:
            return {}
        loss = self.nll / self.tokens
        metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf}
        return metrics | ({"bits_per_byte": self.nll / math.log(2.0) / self.num_bytes} if self.num_bytes else {})


class Perplexity(LeanHooks, Callback):
    """Log ``val/loss`` (nats per token), ``val/perplexity`` and ``val/bits_per_byte``, exact over ranks and batches.

    Lightning averages the averages of batches, which is wrong if batches have different numbers of targets. Here
    float64 sums of nats and int64 counts are accumulated, and reduced over ranks once, at the end of the evaluation:
    ranks may have different numbers of batches, and a row whose labels are all ignored weighs nothing.

    A batch's sums come from the first of these that is available, so no forward pass is made twice:
    ``nll_sum`` and ``num_tokens`` in what ``validation_step`` returned (a mapping or an object); ``logits`` in it, or a
    tensor [batch, seq, vocab] itself; ``module.evaluate_batch(batch)``; and last ``module(batch["input_ids"])``.
    Several validation loaders are logged one by one as well, with Lightning's suffix ``/dataloader_idx_0``.
    ``Trainer.test`` gives ``test/...``. Without a target token nothing is logged. In a fit, batches without
    tokens and modules without logits are reported once, and nothing is measured.

    Args:
        tokenizer: Tokenizer that gives the bytes of text of each token. By default ``trainer.datamodule.tokenizer``;
            without either there are no bits per byte.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lm.callbacks import Perplexity
        >>> trainer = Trainer(callbacks=[Perplexity()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer
        self._byte_lengths: Tensor | None = None
        self._sums: dict[int, _Sums] = {}
        self._measures = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure again, whatever an earlier run was like."""
        self._measures = True

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last evaluation."""
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch, on its device and without waiting for it."""
        self._take(trainer, pl_module, (outputs, batch), dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up over ranks and log."""
        self._finish(trainer, pl_module, "val", len(trainer.num_val_batches))

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last evaluation."""
        self._start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch, on its device and without waiting for it."""
        self._take(trainer, pl_module, (outputs, batch), dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up over ranks and log."""
        self._finish(trainer, pl_module, "test", len(trainer.num_test_batches))

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums = {}
        tokenizer = self._tokenizer or getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        lengths = getattr(tokenizer, "token_byte_lengths", None)
        if lengths is not None:
            self._byte_lengths = torch.as_tensor(lengths(), dtype=torch.int64, device=pl_module.device)
        elif self._tokenizer is not None:
            raise ConfigurationError(
                f"{type(self._tokenizer).__name__} has no token_byte_lengths(), which bits per byte needs. "
                "Give a tokenizer of lightning_lm.tokenizers, or none."
            )

    def _measure(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> _Sums:
        targets = shifted_targets(batch)
        sums = _given_sums(outputs)
        if sums is None:
            logits = logits_in(outputs)
            if logits is None and hasattr(pl_module, "evaluate_batch"):
                with trainer.precision_plugin.val_step_context():
                    sums = _given_sums(pl_module.evaluate_batch(batch))  # type: ignore[operator]
            if sums is None:
                logits = logits_of(trainer, pl_module, _inputs_of(batch)) if logits is None else logits
                sums = _logit_sums(logits, targets)
        nll, tokens = sums
        return _Sums(_float64(nll), tokens.long(), _count_bytes(targets, self._byte_lengths))

    def _take(self, trainer: Trainer, pl_module: LightningModule, step: tuple[Any, Any], dataloader_idx: int) -> None:
        """Add a batch; in a fit, a batch or a module that cannot be measured is reported once and ends nothing."""
        if not self._measures:
            return
        with Attempt() as attempt:
            sums = self._measure(trainer, pl_module, *step)
        if attempt.error is not None:
            if trainer.state.fn != "fit":
                raise attempt.error
            self._measures = False
            rank_zero_warn(f"Perplexity measures nothing in this run ({reason_of(attempt.error)})")
            return
        before = self._sums.get(dataloader_idx)
        self._sums[dataloader_idx] = sums if before is None else before.plus(sums)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str, num_loaders: int) -> None:
        totals = [self._over_ranks(trainer, pl_module, index) for index in range(num_loaders)]
        measured = self._measures
        self._measures = trainer.strategy.reduce_boolean_decision(measured, all=True)
        if measured and not self._measures:
            rank_zero_warn(f"Perplexity measures nothing in this run ({reason_of(None)})")
        if trainer.sanity_checking or not self._measures:
            return
        whole = _Totals(*map(sum, zip(*totals, strict=True)))
        named = {"": whole}
        if num_loaders > 1:
            named |= {f"/dataloader_idx_{index}": total for index, total in enumerate(totals)}
        for suffix, total in named.items():
            for name, value in total.metrics().items():
                pl_module.log(f"{stage}/{name}{suffix}", value, sync_dist=True, add_dataloader_idx=not suffix)
        if not whole.tokens:
            rank_zero_warn(f"Not one token of this evaluation is a target, so {stage}/loss is not logged.")

    def _over_ranks(self, trainer: Trainer, pl_module: LightningModule, index: int) -> _Totals:
        zero = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        sums = self._sums.get(index, _Sums(_float64(zero), zero, zero))
        # Out of place and on every rank, one that had no batch included: only the number of loaders must agree.
        nll = trainer.strategy.reduce(sums.nll.clone(), reduce_op="sum")
        counts = trainer.strategy.reduce(torch.stack([sums.tokens, sums.num_bytes]), reduce_op="sum")
        tokens, num_bytes = counts.tolist()
        return _Totals(float(nll), tokens, num_bytes)


def _inputs_of(batch: Any) -> Tensor:
    inputs: Tensor = batch["input_ids"] if isinstance(batch, Mapping) else batch[0]
    return inputs


def _given_sums(outputs: Any) -> tuple[Tensor, Tensor] | None:
    nll, tokens = field_of(outputs, "nll_sum"), field_of(outputs, "num_tokens")
    return None if nll is None or tokens is None else (torch.as_tensor(nll), torch.as_tensor(tokens))


def _logit_sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum negative log-likelihoods (float64) and count targets; the last position of the logits may be missing."""
    width = targets.shape[1]
    if logits.shape[:2] not in {(len(targets), width), (len(targets), width + 1)}:
        raise ConfigurationError(
            f"Logits of shape {tuple(logits.shape)} do not fit input_ids of shape {(len(targets), width + 1)}: "
            "there must be one vector for each position, or for each but the last."
        )
    rows, flat = logits[:, :width].flatten(0, 1), targets.flatten()
    nll = _float64(torch.zeros((), device=flat.device))
    for piece, labels in zip(rows.split(_CHUNK), flat.split(_CHUNK), strict=True):
        losses = F.cross_entropy(piece.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
        nll = nll + _float64(losses).sum()
    return nll, (flat != IGNORE_INDEX).sum()


def _float64(tensor: Tensor) -> Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # Apple's GPUs have no float64


def _count_bytes(targets: Tensor, byte_lengths: Tensor | None) -> Tensor:
    if byte_lengths is None:
        return torch.zeros((), dtype=torch.int64, device=targets.device)
    lengths = byte_lengths[targets.clamp(min=0)]
    return lengths.masked_fill(targets == IGNORE_INDEX, 0).sum()
