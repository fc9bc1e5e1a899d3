"""Pretraining: the next token of running text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.models import ModelConfig
from lightning_lm.modules.base import LMModule
from lightning_lm.modules.losses import CrossEntropy, TokenLossPart, next_token_targets

__all__ = ["PretrainModule"]


class PretrainModule(LMModule):
    """Trains a model to predict each next token.

    Batches are `types.TokenBatch`; all positions but the last are fed to the model.

    Args:
        model: What to train: a config, built once the tokenizer is known, or a module.
        loss: What is summed over the target tokens.
        settings: Keyword arguments of `LMModule`.
    """

    def __init__(
        self, model: ModelConfig | nn.Module, *, loss: TokenLossPart = CrossEntropy(), **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        self.loss = loss

    def training_loss(self, batch: Mapping[str, Tensor]) -> TokenLoss:
        """Return the sums of a micro-batch."""
        return self.loss(self.model, batch)

    def evaluate_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``nll_sum``, ``num_tokens`` and ``target_ids`` of a batch."""
        with torch.no_grad():
            sums = self.loss(self.model, batch)
        return {"nll_sum": sums.nll_sum, "num_tokens": sums.num_tokens, "target_ids": next_token_targets(batch)}
