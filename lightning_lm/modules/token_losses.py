"""Training losses over tokens, and the log-probabilities and entropies that losses over completions are made of."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_lm.functional.cross_entropy import MeasuredLoss, TokenLoss, token_cross_entropy
from lightning_lm.functional.logprobs import TokenScores, entropy, token_logprobs
from lightning_lm.kernels import linear_cross_entropy, linear_logprob, measured_cross_entropy, output_layer
from lightning_lm.models.own_model import accepted_inputs, whole_logits
from lightning_lm.models.prefix_sharing import answer_features
from lightning_lm.parts import Part
from lightning_lm.protocols import LanguageModel
from lightning_lm.types import IGNORE_INDEX

__all__ = [
    "DFT",
    "NLL",
    "CrossEntropy",
    "ImitationLoss",
    "TokenLossPart",
    "next_token_inputs",
    "next_token_targets",
    "token_scores",
]


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


def token_scores(
    model: nn.Module, batch: Mapping[str, Tensor], *, temperature: float = 1.0, entropy_gradient: bool = False
) -> TokenScores:
    """Return the scores of each token that is learned, float32 [rows, seq - 1], aligned with ``labels[:, 1:]``.

    Only the features of these tokens go through the head, and all logits are never held where the model has `hidden`
    and `head`. Everywhere else the scores are 0, without a gradient. A batch in which nothing is learned gives zeros
    whose gradient is zero for every parameter, so that no rank waits for another.

    Args:
        model: Meets `protocols.LanguageModel`, or returns logits (or an object with ``logits``).
        batch: A `types.TokenBatch`; what rows of a `types.ExperienceBatch` share is computed once where it can be.
        temperature: Sampling temperature, by which the logits are divided; the policy is that distribution.
        entropy_gradient: Let gradients flow through the entropies; otherwise they are for the log.
    """
    inputs, targets = next_token_inputs(batch), next_token_targets(batch)
    learned = targets != IGNORE_INDEX
    options: dict[str, Any] = {"temperature": temperature, "entropy_gradient": entropy_gradient}
    if hasattr(model, "hidden") and hasattr(model, "head"):
        language_model = cast(LanguageModel, model)
        features = answer_features(model, batch, learned)
        features = language_model.hidden(**accepted_inputs(model, inputs))[learned] if features is None else features
        scores = linear_logprob(features, ids=targets[learned], **output_layer(language_model), **options)
    else:
        scores = _scores_of_logits(whole_logits(model, inputs)[learned], targets[learned], **options)
    return TokenScores(*(_spread(values, learned) for values in scores))


def _scores_of_logits(logits: Tensor, ids: Tensor, *, temperature: float, entropy_gradient: bool) -> TokenScores:
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies = entropy(logits, temperature=temperature)
    return TokenScores(token_logprobs(logits, ids, temperature=temperature), entropies)


def _spread(values: Tensor, learned: Tensor) -> Tensor:
    """Put values back to where they were taken from; 0 elsewhere."""
    return values.new_zeros(learned.shape).masked_scatter(learned, values)
