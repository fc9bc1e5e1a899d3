"""Sequence to sequence: the next token of a target, given its source."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lm.data.batches import completed
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.cross_entropy import MeasuredLoss, TokenLoss
from lightning_lm.models import ModelConfig
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.base import Compile, LMModule
from lightning_lm.modules.token_losses import CrossEntropy, ImitationLoss, TokenLossPart, next_token_targets
from lightning_lm.optim import AdamW, Cosine, OptimizerPart, Schedule, SkipRule
from lightning_lm.types import Seq2SeqBatch

__all__ = ["Seq2SeqModule"]


class Seq2SeqModule(LMModule):
    """Trains an encoder-decoder to write targets.

    Batches are `types.Seq2SeqBatch`, as `DenoisingDataModule` and `Seq2SeqDataModule` make them.

    Args:
        model: Model to train: a config, such as `EncoderDecoderConfig`, or a module with ``given``.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        loss: Loss that is summed over the target tokens.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.
        compile: Modules that `torch.compile` is applied to, in place.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.

    Raises:
        ConfigurationError: If the model reads no sources.

    Source:
        Sutskever et al. 2014, arXiv:1409.3215; Raffel et al. 2020, arXiv:1910.10683.
    """

    batch_type = Seq2SeqBatch
    batch_source = "DenoisingDataModule"

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        optimizer: OptimizerPart = AdamW(),
        schedule: Schedule = Cosine(warmup=0.01),
        loss: TokenLossPart | ImitationLoss = CrossEntropy(),
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
            ConfigurationError: If the model reads no sources.
        """
        super().configure_model()
        if not hasattr(self.model, "given"):
            raise ConfigurationError(
                f"Seq2SeqModule trains a model with given(source_ids), and {type(self.model).__name__} has none. Use "
                "an EncoderDecoderConfig; a decoder alone reads sources as prefixes, with PretrainModule."
            )

    def training_loss(self, batch: Mapping[str, Tensor]) -> TokenLoss:
        """Return the sums of a micro-batch."""
        return self._sums(completed(batch))

    def evaluate_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``nll_sum``, ``num_tokens`` and ``target_ids`` of a batch."""
        batch = completed(batch)
        with torch.no_grad():
            sums = self._sums(batch)
        return {"nll_sum": sums.nll_sum, "num_tokens": sums.num_tokens, "target_ids": next_token_targets(batch)}

    def _sums(self, batch: Mapping[str, Tensor]) -> TokenLoss:
        sources = batch["source_ids"], batch.get("source_document_ids")
        found = self.loss(self.model.given(*sources), batch)  # type: ignore[operator]
        return found.loss if isinstance(found, MeasuredLoss) else found
