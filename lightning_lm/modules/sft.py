"""Supervised fine-tuning (SFT) on completions of prompts and on conversations."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lm.data.batches import completed
from lightning_lm.functional.cross_entropy import MeasuredLoss, TokenLoss
from lightning_lm.models import ModelConfig
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.base import Compile, LMModule
from lightning_lm.modules.token_losses import NLL, ImitationLoss, next_token_targets
from lightning_lm.optim import AdamW, Cosine, OptimizerPart, Schedule, SkipRule
from lightning_lm.types import IGNORE_INDEX

__all__ = ["SFTModule"]


class SFTModule(LMModule):
    """Trains a model on the tokens of a batch that have a label.

    Batches are `types.TokenBatch`, as `ChatDataModule` makes them. Besides what every module logs, for training,
    validation and test: ``token_accuracy`` (fraction of target tokens that were the likeliest), ``entropy`` (nats per
    target token) and ``train/num_tokens`` (all tokens so far, prompts included and padding not).

    Args:
        model: Model to train: a config, such as `PretrainedCheckpoint`, or a module.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        loss: Loss of a token.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.
        compile: Modules that `torch.compile` is applied to, in place.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.

    Example:
        >>> from lightning_lm.models import TransformerConfig
        >>> module = SFTModule(TransformerConfig(vocab_size=50, d_model=16, num_layers=1))
    """

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        optimizer: OptimizerPart = AdamW(lr=2e-5),
        schedule: Schedule = Cosine(warmup=0.03),
        loss: ImitationLoss = NLL(),
        skip: SkipRule | None = None,
        compile: Compile = "none",
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(
            model,
            optimizer=optimizer,
            schedule=schedule,
            skip=skip,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
        )
        self.loss = loss

    def training_loss(self, batch: Mapping[str, Tensor]) -> TokenLoss:
        """Return the sums of a micro-batch."""
        batch = completed(batch)
        self.record_total("num_tokens", _num_tokens(batch["labels"]))
        return self._recorded(self.loss(self.model, batch))

    def evaluate_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``nll_sum``, ``num_tokens`` and ``target_ids`` of a batch."""
        batch = completed(batch)
        with torch.no_grad():
            sums = self._recorded(self.loss(self.model, batch))
        return {"nll_sum": sums.nll_sum, "num_tokens": sums.num_tokens, "target_ids": next_token_targets(batch)}

    def _recorded(self, measured: MeasuredLoss) -> TokenLoss:
        count = measured.loss.num_tokens
        self.record("token_accuracy", measured.num_correct, count)
        self.record("entropy", measured.entropy_sum, count)
        return measured.loss


def _num_tokens(labels: Tensor) -> Tensor:
    """Return the number of tokens of rows up to the last target; padding follows."""
    is_target = labels != IGNORE_INDEX
    return is_target.flip(1).cumsum(1).bool().sum()
