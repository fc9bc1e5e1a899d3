"""Losses of tokens to imitate, with what is worth knowing of the predictions."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lightning_lm.functional.cross_entropy import MeasuredLoss, token_cross_entropy
from lightning_lm.functional.logprobs import entropy
from lightning_lm.kernels import measured_cross_entropy, output_layer
from lightning_lm.models.own_model import accepted_inputs, whole_logits
from lightning_lm.modules.token_losses import next_token_inputs, next_token_targets
from lightning_lm.parts import Part
from lightning_lm.protocols import LanguageModel
from lightning_lm.types import IGNORE_INDEX

__all__ = ["DFT", "NLL", "ImitationLoss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImitationLoss(Part):
    """Base of the losses of a token to imitate.

    Args:
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Share of the target spread evenly over the vocabulary. Unitless.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    by_confidence: ClassVar[bool] = False
    """True if each token's loss is multiplied by its probability."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> MeasuredLoss:
        """Return the sums of a batch.

        Only what is learned goes through the head, and all logits are never held where the model has `hidden` and
        `head`.

        Args:
            model: Meets `protocols.LanguageModel`, or returns logits (or an object with ``logits``).
            batch: A `types.TokenBatch`.
        """
        inputs, targets = next_token_inputs(batch), next_token_targets(batch)
        learned = targets != IGNORE_INDEX
        terms: dict[str, Any] = {
            "z_loss": self.z_loss,
            "label_smoothing": self.label_smoothing,
            "by_confidence": self.by_confidence,
        }
        if not (hasattr(model, "hidden") and hasattr(model, "head")):
            return _of_logits(whole_logits(model, inputs)[learned], targets[learned], **terms)
        language_model = cast(LanguageModel, model)
        features = language_model.hidden(**accepted_inputs(model, inputs))[learned]
        return measured_cross_entropy(features, targets=targets[learned], **output_layer(language_model), **terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NLL(ImitationLoss):
    """Cross-entropy: the usual loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DFT(ImitationLoss):
    """Cross-entropy times the token's own probability, so that what the model finds absurd pulls little at it.

    Source:
        Wu et al. 2025, arXiv:2508.05629, equation 9.
    """

    by_confidence: ClassVar[bool] = True


def _of_logits(logits: Tensor, targets: Tensor, **terms: Any) -> MeasuredLoss:
    loss = token_cross_entropy(logits, targets, **terms)
    dtype = loss.nll_sum.dtype
    correct = (logits.argmax(dim=-1) == targets).sum(dtype=dtype)
    return MeasuredLoss(loss, entropy(logits.detach()).sum(dtype=dtype), correct)
