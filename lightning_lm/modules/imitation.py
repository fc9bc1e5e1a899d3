"""Losses of tokens to imitate, with what is worth knowing of the predictions."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn

from lightning_lm.functional.cross_entropy import MeasuredLoss, token_cross_entropy
from lightning_lm.functional.logprobs import entropy
from lightning_lm.kernels import measured_cross_entropy
from lightning_lm.modules.losses import next_token_inputs, next_token_targets
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
    """Whether each token's loss is multiplied by its probability."""

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
        if not (hasattr(model, "hidden") and hasattr(model, "head")):
            output = model(**inputs)
            return self._of_logits(getattr(output, "logits", output)[learned], targets[learned])
        language_model = cast(LanguageModel, model)
        return measured_cross_entropy(
            language_model.hidden(**inputs)[learned],
            language_model.head.weight,
            targets[learned],
            bias=language_model.head.bias,
            softcap=getattr(model, "logit_softcap", None),
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            by_confidence=self.by_confidence,
        )

    def _of_logits(self, logits: Tensor, targets: Tensor) -> MeasuredLoss:
        loss = token_cross_entropy(
            logits,
            targets,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            by_confidence=self.by_confidence,
        )
        dtype = loss.nll_sum.dtype
        correct = (logits.argmax(dim=-1) == targets).sum(dtype=dtype)
        return MeasuredLoss(loss, entropy(logits.detach()).sum(dtype=dtype), correct)


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
