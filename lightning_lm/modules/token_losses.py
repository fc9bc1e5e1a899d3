"""Training losses over tokens, and the log-probabilities and entropies that losses over completions are made of."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.cross_entropy import MeasuredLoss, TokenLoss, token_cross_entropy
from lightning_lm.functional.logprobs import TokenScores, entropy, token_logprobs
from lightning_lm.kernels import linear_cross_entropy, linear_logprob, measured_cross_entropy, output_layer
from lightning_lm.models.multi_token import MultiTokenTransformer
from lightning_lm.models.own_model import hidden_or_whole_logits, with_counted
from lightning_lm.models.unpadding import outputs_at
from lightning_lm.parts import Limit, Part
from lightning_lm.protocols import is_language_model
from lightning_lm.types import IGNORE_INDEX

__all__ = [
    "DFT",
    "NLL",
    "CrossEntropy",
    "ImitationLoss",
    "MultiToken",
    "TokenLossPart",
    "hidden_or_logits",
    "next_token_inputs",
    "next_token_targets",
    "target_mask",
    "token_scores",
]

Batch = Mapping[str, Tensor]
"""A `types.TokenBatch`."""
OutputLayer = dict[str, Any]
"""The arguments ``weight``, ``bias`` and ``softcap`` of a loss on hidden states."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLossPart(Part, abc.ABC):
    """Base of every loss that is a sum over target tokens."""

    @abc.abstractmethod
    def __call__(self, model: nn.Module, batch: Batch) -> TokenLoss:
        """Return the sums of a batch.

        Args:
            model: Meets `protocols.LanguageModel`, or returns logits (or an object with ``logits``).
            batch: A `types.TokenBatch`.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(TokenLossPart, limits={"z_loss": Limit.NON_NEGATIVE, "label_smoothing": Limit.BELOW_ONE}):
    """Cross-entropy of each next token."""

    z_loss: float = 0.0
    """Weight of the squared log-normaliser, which keeps logits from drifting (1e-4 in PaLM). Unitless."""
    label_smoothing: float = 0.0
    """Fraction of the target spread evenly over the vocabulary. Unitless."""

    def __call__(self, model: nn.Module, batch: Batch) -> TokenLoss:
        """Return the sums of a batch; a model that has `hidden` and `head` never builds all logits."""
        targets = next_token_targets(batch)
        values, head = hidden_or_logits(model, batch)
        loss = linear_cross_entropy if head else token_cross_entropy
        return loss(values, targets=targets, z_loss=self.z_loss, label_smoothing=self.label_smoothing, **head)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiToken(CrossEntropy, limits={"weight": Limit.NON_NEGATIVE}):
    """Cross-entropy of the next token and, in training, of those after it.

    The sums of all further tokens are divided by the number of next tokens, so no micro-batch counts more than another,
    and by the number of heads. No token of another document is a target. Metrics are of the next token alone.

    Source:
        DeepSeek-V3, arXiv:2412.19437, equations 24 and 25.
    """

    weight: float = 0.3
    """Weight of the mean over the further tokens; 0.3 and then 0.1 in DeepSeek-V3. Unitless."""

    def __call__(self, model: nn.Module, batch: Batch) -> TokenLoss:
        """Return the sums of a batch.

        Args:
            model: Built from `models.MultiTokenConfig`.
            batch: A `types.TokenBatch`.

        Raises:
            ConfigurationError: If the model has no heads of further tokens, or the batch has prefixes.
        """
        if not model.training:
            return super().__call__(model, batch)
        model = cast(MultiTokenTransformer, _with_heads(model, batch))
        terms: dict[str, Any] = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing, **output_layer(model)}
        inputs = with_counted(model, next_token_inputs(batch), target_mask(batch))
        found = [
            linear_cross_entropy(values, targets=later_targets(batch, ahead), **terms)
            for ahead, values in enumerate(model.hidden_ahead(**inputs))
        ]
        further = sum((loss.loss_sum for loss in found[1:]), torch.zeros_like(found[0].loss_sum))
        return found[0]._replace(loss_sum=found[0].loss_sum + self.weight / len(model.ahead) * further)


def _with_heads(model: nn.Module, batch: Batch) -> nn.Module:
    if not hasattr(model, "hidden_ahead"):
        raise ConfigurationError(
            f"MultiToken needs heads of further tokens, and {type(model).__name__} has none. Describe the model with "
            "--model.model.class_path MultiTokenConfig, or train with CrossEntropy."
        )
    if batch.get("prefix_lengths") is not None:
        raise ConfigurationError(
            "The batch has prefix_lengths, and the heads of further tokens would read targets in a prefix. Train a "
            "prefix language model with CrossEntropy."
        )
    return model


def later_targets(batch: Batch, ahead: int) -> Tensor:
    """Return the token that comes ``ahead`` places after the next one of each position, or ``IGNORE_INDEX``.

    Args:
        batch: A `types.TokenBatch`.
        ahead: Places after the next token; at 0 these are `next_token_targets`.
    """
    targets = batch["labels"][:, ahead + 1 :]
    documents = batch.get("document_ids")
    if documents is None or not ahead:
        return targets
    begun = torch.zeros_like(documents)
    begun[:, 1:] = (documents[:, 1:] != documents[:, :-1]).cumsum(dim=1)
    return targets.masked_fill(begun[:, ahead + 1 :] != begun[:, : -ahead - 1], IGNORE_INDEX)


def next_token_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the arguments of the model: all positions but the last, which predicts nothing."""
    names = ("input_ids", "position_ids", "document_ids", "prefix_lengths")
    given = {name: batch[name] for name in names if batch.get(name) is not None}
    return {name: value[:, :-1] if value.dim() > 1 else value for name, value in given.items()}


def next_token_targets(batch: Batch) -> Tensor:
    """Return the token that each of these positions predicts, or ``IGNORE_INDEX``."""
    return batch["labels"][:, 1:]


def target_mask(batch: Mapping[str, Any]) -> Tensor:
    """Return True for each of these positions that predicts a target token, bool [rows, seq - 1]."""
    return next_token_targets(batch) != IGNORE_INDEX


def hidden_or_logits(model: nn.Module, batch: Batch, mask: Tensor | None = None) -> tuple[Tensor, OutputLayer]:
    """Return hidden states and the output layer that turns them into logits; of a model without `hidden`, its logits.

    Losses take hidden states and `output_layer` because they need not hold all logits then, nor compute those of other
    positions than the targets.

    Args:
        model: Meets `protocols.LanguageModel`, or returns logits (or an object with ``logits``).
        batch: A `types.TokenBatch`. With a mask its padding is not read, and a common prefix of rows once, if the model
            allows.
        mask: Positions that are needed, bool [rows, seq - 1]; by default all.

    Returns:
        Values, [rows, seq - 1, d_model or vocab], or [positions, d_model or vocab] with a mask; and the output
        layer, empty if the values are logits.
    """
    inputs = next_token_inputs(batch)
    x = hidden_or_whole_logits(model, inputs, target_mask(batch)) if mask is None else outputs_at(model, inputs, mask)
    return x, output_layer(model) if is_language_model(model) else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImitationLoss(Part, limits={"z_loss": Limit.NON_NEGATIVE, "label_smoothing": Limit.BELOW_ONE}):
    """Base of the losses of a token to imitate.

    Args:
        z_loss: Weight of the squared log-normaliser. Unitless.
        label_smoothing: Fraction of the target spread evenly over the vocabulary. Unitless.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    by_confidence: ClassVar[bool] = False
    """True if each token's loss is multiplied by its probability."""

    def __call__(self, model: nn.Module, batch: Batch) -> MeasuredLoss:
        """Return the sums of a batch.

        Args:
            model: Meets `protocols.LanguageModel`, or returns logits (or an object with ``logits``).
            batch: A `types.TokenBatch`.
        """
        mask = target_mask(batch)
        values, head = hidden_or_logits(model, batch, mask)
        terms: dict[str, Any] = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing}
        loss = measured_cross_entropy if head else _measured_loss_of_logits
        return loss(values, targets=next_token_targets(batch)[mask], by_confidence=self.by_confidence, **terms, **head)


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


def _measured_loss_of_logits(logits: Tensor, targets: Tensor, **terms: Any) -> MeasuredLoss:
    loss = token_cross_entropy(logits, targets, **terms)
    dtype = loss.nll_sum.dtype
    correct = (logits.argmax(dim=-1) == targets).sum(dtype=dtype)
    return MeasuredLoss(loss, entropy(logits.detach()).sum(dtype=dtype), correct)


def token_scores(
    model: nn.Module, batch: Batch, *, temperature: float = 1.0, entropy_gradient: bool = False
) -> TokenScores:
    """Return the scores of each target token, float32 [rows, seq - 1], aligned with ``labels[:, 1:]``.

    Elsewhere the scores are 0, without a gradient. A batch without target tokens gives zeros whose gradient is zero for
    every parameter, so that no rank waits for another.

    Args:
        model: Meets `protocols.LanguageModel`, or returns logits (or an object with ``logits``).
        batch: A `types.TokenBatch`.
        temperature: Sampling temperature, by which the logits are divided; the policy is that distribution.
        entropy_gradient: Let gradients flow through the entropies; otherwise they are for the log.
    """
    mask = target_mask(batch)
    values, head = hidden_or_logits(model, batch, mask)
    scores = linear_logprob if head else _scores_of_logits
    options: dict[str, Any] = {"temperature": temperature, "entropy_gradient": entropy_gradient}
    found = scores(values, ids=next_token_targets(batch)[mask], **head, **options)
    return TokenScores(*(column.new_zeros(mask.shape).masked_scatter(mask, column) for column in found))


def _scores_of_logits(logits: Tensor, ids: Tensor, *, temperature: float, entropy_gradient: bool) -> TokenScores:
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies = entropy(logits, temperature=temperature)
    return TokenScores(token_logprobs(logits, ids, temperature=temperature), entropies)
