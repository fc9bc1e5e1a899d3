"""Modules whose policy is compared with a reference: the reference is built, prepared, saved and moved here."""

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lm.models import ModelConfig
from lightning_lm.modules.base import LMModule
from lightning_lm.modules.preference.reference import Reference, ReferenceScores

__all__ = ["ComparedModule"]


class ComparedModule(LMModule, abc.ABC):
    """Base of the objectives on preferences. Dropout is off: it would add noise to every comparison.

    Args:
        model: A config, built once the tokenizer is known, or a module.
        reference: Model that the policy is compared with; ``None`` builds none.
        options: Further arguments of `LMModule`.
    """

    def __init__(self, model: ModelConfig | nn.Module, *, reference: Reference | None, **options: Any) -> None:
        super().__init__(model, **options)
        self.reference_part = reference
        self.reference: ReferenceScores | None = None

    def configure_model(self) -> None:
        """Build the model, and the reference from it, once."""
        super().configure_model()
        self.model.eval()
        if self.reference is None and self.reference_part is not None:
            self.reference = self.reference_part.build(self.model, self._datamodule())

    def train(self, mode: bool = True) -> "ComparedModule":
        """Set the mode of everything but the policy, which stays in evaluation mode: no dropout."""
        super().train(mode)
        if hasattr(self, "model"):
            self.model.eval()
        return self

    def on_fit_start(self) -> None:
        """Compute what the reference needs before training."""
        super().on_fit_start()
        self._prepare_reference()

    def on_validation_start(self) -> None:
        """Compute what the reference needs, where no training came before."""
        self._prepare_reference()

    def on_test_start(self) -> None:
        """Compute what the reference needs, where no training came before."""
        self._prepare_reference()

    def _prepare_reference(self) -> None:
        if self.reference is not None:
            self.reference.prepare(self)

    def evaluate_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of the loss as ``nll_sum``, and the number of pairs or completions as ``num_tokens``."""
        with torch.no_grad():
            sums = self.training_loss(batch)
        return {"nll_sum": sums.nll_sum, "num_tokens": sums.num_tokens}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, and let the reference follow before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        if self.reference is not None:
            self.reference.follow(self.model, self.trainer.global_step + 1)
