"""Names that every part shares: what the axes of a tensor mean, what a batch holds, which targets are ignored.

Axis names used in shape annotations: ``batch`` (rows), ``seq`` (token positions of a row), ``vocab`` (token ids),
``d_model`` (features of the residual stream), ``heads``, ``kv_heads``, ``head_dim``.
"""

from typing import NotRequired, TypedDict

from torch import Tensor

__all__ = ["IGNORE_INDEX", "ExperienceBatch", "PairBatch", "TokenBatch", "UnpairedBatch"]

IGNORE_INDEX = -100
"""Label of a position at which nothing is learned or measured (the value of torch and transformers)."""


class TokenBatch(TypedDict):
    """Rows of tokens, as every LightningModule of this package receives them.

    ``labels`` are not shifted: ``labels[:, t]`` is the token at position ``t`` or ``IGNORE_INDEX``, and the prediction
    made at ``t - 1`` is compared with it. In packed rows the first token of each document has the label
    ``IGNORE_INDEX``, so that no target crosses a document boundary.
    """

    input_ids: Tensor
    """int64 [batch, seq]."""
    labels: NotRequired[Tensor]
    """int64 [batch, seq], ``IGNORE_INDEX`` where nothing is learned. Left out, every token is a target, except the
    first of a document and those that ``attention_mask``, ``completion_mask`` or ``assistant_masks`` (of transformers
    and trl) exclude."""
    position_ids: NotRequired[Tensor]
    """int64 [batch, seq], from 0 again at each document."""
    document_ids: NotRequired[Tensor]
    """int64 [batch, seq], equal within a document and non-decreasing along a row; padding is a document of its own."""


class PairBatch(TypedDict):
    """Preferences: ``pairs`` preferred answers, then the other answer to each, all with their prompts, padded right."""

    input_ids: Tensor
    """int64 [2 * pairs, seq]. Both rows of a pair begin with the same prompt ids."""
    labels: Tensor
    """int64 [2 * pairs, seq], unshifted, ``IGNORE_INDEX`` outside the answer. A pair without any counts nothing."""
    position_ids: Tensor
    """int64 [2 * pairs, seq]."""
    lengths: Tensor
    """int64 [2 * pairs]: tokens of a row, padding left out."""
    margin: Tensor
    """float32 [pairs]: how much better the preferred answer is, 0 where the data does not say. Units of reward."""
    pair_ids: Tensor
    """int64 [pairs]: number of the pair in the data, training pairs first."""


class UnpairedBatch(TypedDict):
    """Completions with their prompts, padded on the right, each desirable or not."""

    input_ids: Tensor
    """int64 [rows, seq]."""
    labels: Tensor
    """int64 [rows, seq], unshifted, ``IGNORE_INDEX`` outside the completion. A row without any counts nothing."""
    position_ids: Tensor
    """int64 [rows, seq]."""
    desirable: Tensor
    """bool [rows]."""
    mismatched_input_ids: NotRequired[Tensor]
    """int64 [mismatched, seq]: prompts with completions of others, for the KL estimate. Those of a whole optimizer step
    come with its first micro-batch."""
    mismatched_labels: NotRequired[Tensor]
    """int64 [mismatched, seq], as ``labels``."""
    mismatched_position_ids: NotRequired[Tensor]
    """int64 [mismatched, seq]."""


class ExperienceBatch(TypedDict):
    """Answers that a policy gave, each with its prompt, padded right, and what is needed to learn from them."""

    input_ids: Tensor
    """int64 [rows, seq]."""
    labels: Tensor
    """int64 [rows, seq], unshifted, ``IGNORE_INDEX`` outside the answer and in answers that nothing is learned from."""
    advantages: Tensor
    """float32 [rows], or [rows, seq - 1] aligned with ``labels[:, 1:]``: how much better than expected, in reward."""
    tokens_per_row: float
    """Mean number of learned tokens of a row, over the whole rollout and all ranks."""
    old_logprobs: NotRequired[Tensor]
    """float32 [rows, seq - 1]: of the policy that gave the answers, nats. Left out, the present policy did.

    In a rollout NaN for the answers that are learned first, until they are.
    """
    reference_logprobs: NotRequired[Tensor]
    """float32 [rows, seq - 1]: of the policy to stay near to, nats."""
    importance_weights: NotRequired[Tensor]
    """float32 [rows, seq - 1]: factor on each token's loss."""
    prompt_numbers: NotRequired[Tensor]
    """int64 [rows]: equal in rows that begin with the same prompt."""
    prompt_lengths: NotRequired[Tensor]
    """int64 [rows]: tokens of that prompt, at least one."""
    num_fresh: NotRequired[int]
    """Answers of a rollout, the first that are learned from, whose ``old_logprobs`` that step computes itself."""
    row_ids: NotRequired[Tensor]
    """int64 [rows]: numbers in the rollout of such answers, where a later epoch will learn from them again."""
    policy_version: NotRequired[int]
    """Optimizer steps of the policy that gave the answers."""
