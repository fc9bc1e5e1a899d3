"""Shared names: axes of tensors, fields of batches, the index of ignored targets.

Axis names used in shape annotations: ``batch`` (rows), ``seq`` (token positions of a row), ``vocab`` (token ids),
``d_model`` (features of the residual stream), ``heads``, ``kv_heads``, ``head_dim``.
"""

from typing import TYPE_CHECKING, NotRequired, TypedDict

if TYPE_CHECKING:  # importing the readers of data must not import torch
    from torch import Tensor

__all__ = [
    "IGNORE_INDEX",
    "ExperienceBatch",
    "MaskedBatch",
    "PairBatch",
    "Seq2SeqBatch",
    "TokenBatch",
    "UnpairedBatch",
]

IGNORE_INDEX = -100
"""Label of a position without a loss or a metric (the value of torch and transformers)."""


class TokenBatch(TypedDict):
    """Rows of tokens, as every LightningModule of this package receives them.

    ``labels`` are not shifted: ``labels[:, t]`` is the token at position ``t`` or ``IGNORE_INDEX``, and the prediction
    made at ``t - 1`` is compared with it. In packed rows the first token of each document has the label
    ``IGNORE_INDEX``, so that no target crosses a document boundary.
    """

    input_ids: "Tensor"
    """int64 [batch, seq]."""
    labels: NotRequired["Tensor"]
    """int64 [batch, seq], ``IGNORE_INDEX`` at positions without a loss. By default every token is a target, except the
    first of a document and those that ``attention_mask``, ``completion_mask`` or ``assistant_masks`` (of transformers
    and trl) exclude."""
    position_ids: NotRequired["Tensor"]
    """int64 [batch, seq], from 0 again at each document."""
    document_ids: NotRequired["Tensor"]
    """int64 [batch, seq], equal within a document and non-decreasing along a row; padding is a document of its own."""

    prefix_lengths: NotRequired["Tensor"]
    """int64 [batch] or [batch, seq]: tokens at the start of the row, or of the token's document, that see each other in
    both directions (a prefix language model); by default none."""


class MaskedBatch(TypedDict):
    """Rows of tokens some of which are hidden, for a model that reads in both directions.

    ``labels[:, t]`` is the token that was at position ``t``, and the prediction made at ``t`` is compared with it.
    """

    input_ids: "Tensor"
    """int64 [batch, seq]."""
    labels: "Tensor"
    """int64 [batch, seq], ``IGNORE_INDEX`` where nothing is predicted."""
    position_ids: NotRequired["Tensor"]
    """int64 [batch, seq], from 0 again at each document."""
    document_ids: NotRequired["Tensor"]
    """int64 [batch, seq], equal within a document and non-decreasing along a row; padding is a document of its own."""
    token_type_ids: NotRequired["Tensor"]
    """int64 [batch, seq]: index of the segment, for models with token types; by default 0."""


class Seq2SeqBatch(TypedDict):
    """Sources and targets for an encoder-decoder; without document ids each row has one of each.

    ``input_ids`` and ``labels`` are those of a `TokenBatch`: the begin token, then the target.
    """

    input_ids: "Tensor"
    """int64 [batch, seq]: tokens of the targets, each after the begin token."""
    labels: "Tensor"
    """int64 [batch, seq], unshifted, ``IGNORE_INDEX`` at the begin tokens and in the padding."""
    source_ids: "Tensor"
    """int64 [batch, source_seq]: tokens of the sources."""
    document_ids: NotRequired["Tensor"]
    """int64 [batch, seq]: index of the target; padding has one of its own."""
    source_document_ids: NotRequired["Tensor"]
    """int64 [batch, source_seq]: index of the source, equal to that of its target; padding has one of its own."""


class PairBatch(TypedDict):
    """Preferences: ``pairs`` chosen completions, then the rejected ones, each after its prompt, padded right."""

    input_ids: "Tensor"
    """int64 [2 * pairs, seq]. Both rows of a pair begin with the same prompt ids."""
    labels: "Tensor"
    """int64 [2 * pairs, seq], unshifted, ``IGNORE_INDEX`` outside the completion. Pairs without any do not count."""
    position_ids: "Tensor"
    """int64 [2 * pairs, seq]."""
    lengths: "Tensor"
    """int64 [2 * pairs]: tokens of a row, without padding."""
    margin: "Tensor"
    """float32 [pairs]: margin of the chosen completion, 0 if the data has none. Units of reward."""
    pair_ids: "Tensor"
    """int64 [pairs]: number of the pair in the data, training pairs first."""


class UnpairedBatch(TypedDict):
    """Completions with their prompts, padded on the right, each desirable or not."""

    input_ids: "Tensor"
    """int64 [rows, seq]."""
    labels: "Tensor"
    """int64 [rows, seq], unshifted, ``IGNORE_INDEX`` outside the completion. A row without any counts nothing."""
    position_ids: "Tensor"
    """int64 [rows, seq]."""
    desirable: "Tensor"
    """bool [rows]."""
    mismatched_input_ids: NotRequired["Tensor"]
    """int64 [mismatched, seq]: prompts with completions of others, for the KL estimate. Those of a whole optimizer step
    come with its first micro-batch."""
    mismatched_labels: NotRequired["Tensor"]
    """int64 [mismatched, seq], as ``labels``."""
    mismatched_position_ids: NotRequired["Tensor"]
    """int64 [mismatched, seq]."""


class ExperienceBatch(TypedDict):
    """Completions that a policy sampled, each after its prompt, padded right, with the inputs of the policy loss."""

    input_ids: "Tensor"
    """int64 [rows, seq]."""
    labels: "Tensor"
    """int64 [rows, seq], unshifted, ``IGNORE_INDEX`` outside the completion and in completions without a loss."""
    advantages: "Tensor"
    """float32 [rows], or [rows, seq - 1] aligned with ``labels[:, 1:]``: how much better than expected, in reward."""
    tokens_per_row: float
    """Mean number of target tokens of a row, over the whole rollout and all ranks."""
    old_logprobs: NotRequired["Tensor"]
    """float32 [rows, seq - 1]: log-probabilities under the policy that sampled, nats; by default the current policy.

    In a rollout NaN for the completions of the first optimizer step, which fills them in.
    """
    reference_logprobs: NotRequired["Tensor"]
    """float32 [rows, seq - 1]: of the policy to stay near to, nats."""
    importance_weights: NotRequired["Tensor"]
    """float32 [rows, seq - 1]: factor on each token's loss."""
    num_fresh: NotRequired[int]
    """Completions of the first optimizer step after a rollout, which computes their ``old_logprobs`` itself."""
    row_ids: NotRequired["Tensor"]
    """int64 [rows]: indices in the rollout of such completions, if a later epoch trains on them again."""
    policy_version: NotRequired[int]
    """Optimizer steps of the policy that sampled the completions."""
