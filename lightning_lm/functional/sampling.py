"""From next-token logits to a token: what each decoding option does to a row of logits, and how one id is drawn.

Every function takes logits ``[batch, vocab]`` and returns logits of the same shape in which an excluded token is
``-inf``; reductions are in float32 or better. `lightning_lm.generation.Sampling` puts them in order.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.dtypes import accumulation_dtype
from lightning_lm.functional.shapes import require_shape

__all__ = [
    "draw",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalize_counts",
    "penalize_repetition",
    "scale_by_temperature",
    "verify_draft",
]


def penalize_repetition(
    logits: Float[Tensor, "batch vocab"], seen: Bool[Tensor, "batch vocab"], penalty: float
) -> Float[Tensor, "batch vocab"]:
    """Make tokens less likely that the prompt or the completion already holds.

    CTRL divides the logit of a seen token by the penalty, which would reward a token whose logit is negative. So a
    negative logit is multiplied instead, as every implementation does since.

    Args:
        logits: One row per sequence.
        seen: True where the sequence holds the token.
        penalty: Above 1 discourages, below 1 encourages repetition. Unitless.

    Source:
        Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    require_shape("batch vocab", logits=logits, seen=seen)
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def penalize_counts(
    logits: Float[Tensor, "batch vocab"],
    counts: Int[Tensor, "batch vocab"],
    *,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> Float[Tensor, "batch vocab"]:
    """Lower the logit of a token by a constant once it was generated, and by another each time it was.

    Args:
        logits: One row per sequence.
        counts: Occurrences of each token in the completion (not the prompt) so far.
        presence: Subtracted once from a token that occurs. In logits.
        frequency: Subtracted for each occurrence. In logits.

    Source:
        OpenAI API reference, ``presence_penalty`` and ``frequency_penalty``.
    """
    require_shape("batch vocab", logits=logits, counts=counts)
    wide = _at_least_float32(logits)
    times = counts.to(wide.dtype)
    return (wide - frequency * times - presence * times.clamp(max=1)).to(logits.dtype)


def scale_by_temperature(logits: Float[Tensor, "batch vocab"], temperature: float) -> Float[Tensor, "batch vocab"]:
    """Sharpen (below 1) or flatten (above 1) the distribution; 0 leaves only the likeliest token.

    The largest logit of a row becomes 0, so that a tiny temperature cannot overflow. Of equally likely tokens the one
    with the lowest id is the likeliest.

    Args:
        logits: One row per sequence.
        temperature: Divisor of the logits, at least 0. Unitless.
    """
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def keep_top_k(logits: Float[Tensor, "batch vocab"], k: int) -> Float[Tensor, "batch vocab"]:
    """Keep the ``k`` likeliest tokens, and those exactly as likely as the last of them.

    Args:
        logits: One row per sequence.
        k: At least 1; a number above the vocabulary keeps all.

    Source:
        Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """
    if k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Float[Tensor, "batch vocab"], p: float) -> Float[Tensor, "batch vocab"]:
    """Keep the smallest set of likeliest tokens whose probability reaches ``p``; at least one token stays.

    Of equally likely tokens the lower id comes first.

    Args:
        logits: One row per sequence.
        p: Probability mass to keep, above 0 and at most 1.

    Source:
        Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    if p >= 1:
        return logits
    wide = _at_least_float32(logits)
    total = wide.logsumexp(dim=-1, keepdim=True)
    ordered = _largest_values(wide, total, p)
    probabilities = (ordered - total).exp()
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    size = (mass_before < p).sum(dim=-1, keepdim=True).clamp(min=1)
    least = ordered.gather(-1, size - 1)
    ties = wide == least
    kept_ties = size - (ordered > least).sum(dim=-1, keepdim=True)
    return logits.masked_fill((wide < least) | (ties & (ties.cumsum(dim=-1) > kept_ties)), -math.inf)


def keep_min_p(logits: Float[Tensor, "batch vocab"], p: float) -> Float[Tensor, "batch vocab"]:
    """Keep the tokens that are at least ``p`` times as likely as the likeliest.

    Args:
        logits: One row per sequence.
        p: Fraction of the largest probability, from 0 (keeps all) to 1 (keeps the likeliest).

    Source:
        Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    if p <= 0:
        return logits
    threshold = logits.amax(dim=-1, keepdim=True) + math.log(p)
    return logits.masked_fill(logits < threshold, -math.inf)


def draw(logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Draw one token per row from the softmax of its logits, by inverting the cumulative distribution.

    One uniform number decides a row, so a row's draw depends on nothing but its own logits and that number, whatever
    else is in the batch. A row that has no distribution (it holds NaN, or nothing but ``-inf``) gives the id
    ``vocab``, which no token has.

    Args:
        logits: One row per sequence.
        uniforms: Independent numbers of [0, 1), best in float64.
    """
    _require_rows(logits, uniforms=uniforms)
    # float64 because the rounding of a float32 sum over a large vocabulary is larger than many of its probabilities.
    dtype = accumulation_dtype(logits.device)
    cumulative = _at_least_float32(logits).softmax(dim=-1).to(dtype).cumsum(dim=-1)
    below_one = 1 - torch.finfo(dtype).eps / 2  # rounding to this type may have made a 1 of the number
    targets = uniforms.to(dtype).clamp(max=below_one)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def verify_draft(
    logits: Float[Tensor, "batch vocab"],
    draft_logits: Float[Tensor, "batch vocab"],
    ids: Int[Tensor, " batch"],
    uniforms: Float[Tensor, "batch 2"],
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Turn tokens that were drawn from one distribution into tokens of another; return them, and which were kept.

    A token is kept with probability ``min(1, p / q)``; one that is not is replaced by a draw from ``max(0, p - q)``.
    What comes out is distributed as ``p``, however bad the draft is.

    Args:
        logits: Logits of the target distribution ``p``.
        draft_logits: Logits of the distribution ``q`` that the ids were drawn from.
        ids: The drawn tokens.
        uniforms: Two independent numbers of [0, 1) per row: to keep or not, and to draw the replacement.

    Source:
        Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318, algorithm 2.
    """
    require_shape("batch vocab", logits=logits, draft_logits=draft_logits)
    _require_rows(logits, ids=ids, uniforms=uniforms[..., 0])
    wanted, drafted = _at_least_float32(logits).softmax(dim=-1), _at_least_float32(draft_logits).softmax(dim=-1)
    p, q = (probabilities.gather(-1, ids[:, None])[:, 0] for probabilities in (wanted, drafted))
    kept = uniforms[:, 0] * q < p
    return torch.where(kept, ids, draw((wanted - drafted).clamp(min=0).log(), uniforms[:, 1])), kept


def _require_rows(logits: Tensor, **numbers: Tensor) -> None:
    """Refuse numbers that are not one for each row of logits."""
    require_shape("batch vocab", logits=logits)
    for name, values in numbers.items():
        if values.shape != logits.shape[:1]:
            raise ConfigurationError(
                f"{name} has shape {tuple(values.shape)} for logits of shape {tuple(logits.shape)}; one is needed for "
                f"each of the {len(logits)} rows."
            )


def _largest_values(
    logits: Float[Tensor, "batch vocab"], total: Float[Tensor, "batch 1"], p: float
) -> Float[Tensor, "batch largest"]:
    """Return the largest logits of each row, in falling order: at least as many as hold the probability ``p``.

    A few hundred tokens nearly always do, and a CPU finds them several times faster than it sorts a vocabulary.
    Elsewhere the look at the probabilities would cost more than the sorting.

    Args:
        logits: One row per sequence.
        total: Their logsumexp.
        p: Probability mass.
    """
    few = 256
    if logits.device.type == "cpu" and logits.shape[-1] > 4 * few:
        values = logits.topk(few, dim=-1).values
        if bool(((values - total).exp().sum(dim=-1) >= p).all()):
            return values
    return logits.sort(dim=-1, descending=True).values


def _at_least_float32(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return logits if logits.dtype == torch.float64 else logits.float()
