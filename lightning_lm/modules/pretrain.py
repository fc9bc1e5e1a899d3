"""Pretraining: the next token of running text."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lm.data.batches import completed
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.models import ModelConfig
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.base import Compile, LMModule
from lightning_lm.modules.token_losses import CrossEntropy, TokenLossPart, next_token_targets
from lightning_lm.optim import AdamW, Cosine, OptimizerPart, Schedule, SkipRule

__all__ = ["PretrainModule"]


class PretrainModule(LMModule):
    """Trains a model to predict each next token.

    Batches are `types.TokenBatch`; all positions but the last are fed to the model. Without labels every token is a
    target.

    Args:
        model: Model to train: a config, built once the tokenizer is known, or a module.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        loss: Loss that is summed over the target tokens.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.
        compile: Modules that `torch.compile` is applied to, in place.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.

    Example:
        >>> from lightning_lm.models import TransformerConfig
        >>> module = PretrainModule(TransformerConfig(vocab_size=50, d_model=16, num_layers=1))
    """

    batch_source = "TextDataModule"

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        optimizer: OptimizerPart = AdamW(),
        schedule: Schedule = Cosine(warmup=0.01),
        loss: TokenLossPart = CrossEntropy(),
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
        return self.loss(self.model, completed(batch))

    def evaluate_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``nll_sum``, ``num_tokens`` and ``target_ids`` of a batch."""
        batch = completed(batch)
        with torch.no_grad():
            sums = self.loss(self.model, batch)
        return {"nll_sum": sums.nll_sum, "num_tokens": sums.num_tokens, "target_ids": next_token_targets(batch)}
