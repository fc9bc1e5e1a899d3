"""Log-probabilities and entropies of the tokens that a model is trained on, for losses over completions."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lm.functional.logprobs import TokenScores, entropy, token_logprobs
from lightning_lm.kernels import linear_logprob, output_layer
from lightning_lm.models.own_model import accepted_inputs, whole_logits
from lightning_lm.models.prefix_sharing import answer_features
from lightning_lm.modules.token_losses import next_token_inputs, next_token_targets
from lightning_lm.protocols import LanguageModel
from lightning_lm.types import IGNORE_INDEX

__all__ = ["token_scores"]


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
