"""Masked language modelling: hidden tokens are predicted from both sides; only their positions go through the head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.cross_entropy import MeasuredLoss, TokenLoss
from lightning_lm.kernels import measured_cross_entropy, output_layer
from lightning_lm.models import ModelConfig
from lightning_lm.models.own_model import with_counted
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.base import Compile, LMModule
from lightning_lm.modules.token_losses import ImitationLoss
from lightning_lm.optim import AdamW, Cosine, OptimizerPart, Schedule, SkipRule
from lightning_lm.types import IGNORE_INDEX, MaskedBatch

__all__ = ["MaskedLMModule", "MaskedNLL"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedNLL(ImitationLoss):
    """Cross-entropy of the tokens that have a label, each at its own position.

    Args:
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Fraction of the target spread evenly over the vocabulary. Unitless.
    """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> MeasuredLoss:
        """Return the sums of a batch.

        Args:
            model: Has `hidden` and `head`.
            batch: A `types.MaskedBatch`.
        """
        encoder: Any = model
        mask = batch["labels"] != IGNORE_INDEX
        inputs = with_counted(model, {name: value for name, value in batch.items() if name != "labels"}, mask)
        terms: dict[str, Any] = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing}
        return measured_cross_entropy(
            encoder.hidden(**inputs)[mask], targets=batch["labels"][mask], **terms, **output_layer(encoder)
        )


class MaskedLMModule(LMModule):
    """Trains an encoder to predict hidden tokens.

    Batches are `types.MaskedBatch`, as `MaskedTextDataModule` makes them. Besides what every module logs, for training,
    validation and test: ``token_accuracy`` (fraction of hidden tokens that were the likeliest).

    Args:
        model: Model to train: a config, such as `EncoderConfig`, or a module.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        loss: Loss that is summed over the hidden tokens.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.
        compile: Modules that `torch.compile` is applied to, in place.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.

    Raises:
        ConfigurationError: If the model is causal.

    Source:
        Devlin et al. 2019, arXiv:1810.04805.

    Example:
        >>> from lightning_lm.models import EncoderConfig
        >>> module = MaskedLMModule(EncoderConfig(vocab_size=50, d_model=16, num_layers=1))
    """

    batch_type = MaskedBatch
    batch_source = "MaskedTextDataModule"
    predicts_next = False

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        optimizer: OptimizerPart = AdamW(),
        schedule: Schedule = Cosine(warmup=0.01),
        loss: MaskedNLL = MaskedNLL(),
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

    def configure_model(self) -> None:
        """Build the model and prepare its layers, once.

        Raises:
            ConfigurationError: If no token of the model sees later ones.
        """
        super().configure_model()
        if getattr(self.model, "is_causal", False):
            raise ConfigurationError(
                "MaskedLMModule predicts hidden tokens from both sides, and every layer of the model is causal. Use an "
                "EncoderConfig, or layers of Attention(causal=False); PretrainModule trains causal models."
            )

    def training_loss(self, batch: Mapping[str, Tensor]) -> TokenLoss:
        """Return the sums of a micro-batch."""
        return self._recorded(self.loss(self.model, batch))

    def evaluate_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``nll_sum``, ``num_tokens`` and ``target_ids`` of a batch."""
        with torch.no_grad():
            sums = self._recorded(self.loss(self.model, batch))
        return {"nll_sum": sums.nll_sum, "num_tokens": sums.num_tokens, "target_ids": batch["labels"]}

    def _recorded(self, measured: MeasuredLoss) -> TokenLoss:
        self.record("token_accuracy", measured.num_correct, measured.loss.num_tokens)
        return measured.loss
