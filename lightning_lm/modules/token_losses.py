"""Training losses over tokens, as parts."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from lightning_lm.functional.cross_entropy import TokenLoss, token_cross_entropy
from lightning_lm.kernels import linear_cross_entropy, output_layer
from lightning_lm.models.own_model import accepted_inputs, whole_logits
from lightning_lm.parts import Part
from lightning_lm.protocols import LanguageModel

__all__ = ["CrossEntropy", "TokenLossPart", "next_token_inputs", "next_token_targets"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLossPart(Part, abc.ABC):
    """Base of every loss that is a sum over target tokens."""

    @abc.abstractmethod
    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> TokenLoss:
        """Return the sums of a batch.

        Args:
            model: Meets `protocols.LanguageModel`, or returns logits (or an object with ``logits``).
            batch: A `types.TokenBatch`.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(TokenLossPart):
    """Cross-entropy of each next token."""

    z_loss: float = 0.0
    """Weight of the squared log-normaliser, which keeps logits from drifting (1e-4 in PaLM). Unitless."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary. Unitless."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> TokenLoss:
        """Return the sums of a batch; all logits are never held where the model has `hidden` and `head`."""
        inputs, targets = next_token_inputs(batch), next_token_targets(batch)
        if not (hasattr(model, "hidden") and hasattr(model, "head")):
            logits = whole_logits(model, inputs)
            return token_cross_entropy(logits, targets, z_loss=self.z_loss, label_smoothing=self.label_smoothing)
        language_model = cast(LanguageModel, model)
        features = language_model.hidden(**accepted_inputs(model, inputs))
        terms: dict[str, Any] = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing}
        return linear_cross_entropy(features, targets=targets, **output_layer(language_model), **terms)


def next_token_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments of the model: all positions but the last, which predicts nothing."""
    names = ("input_ids", "position_ids", "document_ids")
    return {name: batch[name][:, :-1] for name in names if batch.get(name) is not None}


def next_token_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the token that each of these positions predicts, or ``IGNORE_INDEX``."""
    return batch["labels"][:, 1:]
