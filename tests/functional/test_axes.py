"""Tensors with other axes are refused: taken for the right ones they would give numbers, and wrong ones."""

import contextlib
import inspect

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional import causal_attention, group_advantages, rotate
from lightning_lm.functional.advantages import explained_variance, gae, whiten
from lightning_lm.functional.context_parallel import context_parallel_attention, shard_sequence
from lightning_lm.functional.cross_entropy import token_cross_entropy
from lightning_lm.functional.flash_attention import flash_attention as plain_flash_attention
from lightning_lm.functional.logprobs import masked_mean, masked_normalize, sequence_logprobs, token_logprobs
from lightning_lm.functional.policy import (
    CISPO,
    GSPO,
    ClippedSurrogate,
    PolicyGradient,
    clipped_value_loss,
    kl_estimate,
)
from lightning_lm.functional.preference import (
    IPO,
    KTO,
    NCA,
    APODown,
    APOZero,
    ChosenNLL,
    Hinge,
    PairLogProbs,
    Robust,
    Sigmoid,
    SimPO,
    bradley_terry_loss,
)
from lightning_lm.functional.sampling import draw, penalize_counts, penalize_repetition, verify_draft
from lightning_lm.kernels import linear_cross_entropy, linear_logprob
from lightning_lm.kernels.attention import attention
from lightning_lm.kernels.flash_attention.operation import flash_attention
from lightning_lm.kernels.rope import rope

# As they are outside of tests: without the check of annotations.
ATTENTIONS = [inspect.unwrap(f) for f in (causal_attention, attention, plain_flash_attention, flash_attention)]


@pytest.mark.parametrize("attend", ATTENTIONS, ids=lambda function: f"{function.__module__}.{function.__name__}")
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 1, 8)], ids=str)
def test_attention_names_its_four_axes(attend, shape):
    good, bad = torch.ones(2, 4, 3, 8), torch.ones(shape)
    with pytest.raises(ConfigurationError, match=r"query has shape \(.*\[batch, heads, queries, head_dim\]"):
        attend(bad, bad, bad)
    for arguments in ((good, bad, good), (good, good, bad)):
        with pytest.raises(ConfigurationError, match=r"\[batch, kv_heads, keys, head_dim\]"):
            attend(*arguments)


@pytest.mark.parametrize("attend", ATTENTIONS[:2])
def test_more_queries_than_keys_are_refused(attend):
    """The first queries would see nothing, and a softmax over nothing is NaN."""
    with pytest.raises(ConfigurationError, match="5 queries and 3 keys"):
        attend(torch.ones(2, 4, 5, 8), torch.ones(2, 4, 3, 8), torch.ones(2, 4, 3, 8))


def test_rotations_name_their_four_axes():
    x, table = torch.ones(3, 3, 8), torch.ones(3, 1, 8)
    with pytest.raises(ConfigurationError, match=r"x has shape \(3, 3, 8\).*\[batch, seq, heads, head_dim\]"):
        inspect.unwrap(rotate)(x, table, table)
    with pytest.raises(ConfigurationError, match=r"k has shape \(3, 3, 8\)"):
        inspect.unwrap(rope)(x[None], x, table, table)


@pytest.mark.parametrize("rewards", [torch.ones(4), torch.ones(2, 2, 2)], ids=["1-D", "3-D"])
def test_advantages_name_their_two_axes(rewards):
    with pytest.raises(ConfigurationError, match=r"rewards has shape .*\[prompts, samples\]"):
        inspect.unwrap(group_advantages)(rewards)


ROWS, ONES = torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool)
PER_ROW, COLUMN = torch.ones(4), torch.ones(4, 1)
IDS = torch.ones(4, 3, dtype=torch.int64)
LOSSES = [Sigmoid(), Sigmoid(length_normalize=True), Robust(), IPO(), Hinge(), NCA(), APOZero(), APODown(), SimPO()]
OTHER_SHAPES = {
    "masked_mean": lambda: call(masked_mean, ROWS, ONES[0]),
    "masked_normalize": lambda: call(masked_normalize, ROWS, ONES[:, :1], 1.0),
    "sequence_logprobs": lambda: call(sequence_logprobs, ROWS, ONES[0]),
    "surrogate": lambda: call(ClippedSurrogate(), ROWS, ROWS, ROWS[0], ONES),
    "old log-probabilities": lambda: call(ClippedSurrogate(), ROWS, ROWS[:1], ROWS, ONES),
    "gradient": lambda: call(PolicyGradient(), ROWS, ROWS, COLUMN, ONES),
    "gspo": lambda: call(GSPO(), ROWS, ROWS, COLUMN, ONES),
    "cispo": lambda: call(CISPO(), ROWS, COLUMN, ROWS, ONES),
    "kl": lambda: call(kl_estimate, ROWS, COLUMN),
    "values": lambda: call(clipped_value_loss, ROWS, ROWS, COLUMN),
    "gae": lambda: call(gae, ROWS, ROWS, ONES[:, :1]),
    "whiten": lambda: call(whiten, ROWS, ONES[0]),
    "explained": lambda: call(explained_variance, ROWS, ROWS[:, :1], ONES),
    "bradley-terry": lambda: call(bradley_terry_loss, PER_ROW, COLUMN),
    "margin": lambda: call(bradley_terry_loss, PER_ROW, PER_ROW, margin=COLUMN),
    "kto": lambda: call(KTO(), PER_ROW, ONES[:, :1], torch.zeros(())),
    "repetition": lambda: call(penalize_repetition, ROWS, ONES[:, :1], 2.0),
    "counts": lambda: call(penalize_counts, ROWS, IDS[0]),
    "draft": lambda: call(verify_draft, ROWS, ROWS[:1], IDS[:, 0], torch.rand(4, 2)),
}


def call(function, *arguments, **settings):
    """Call a function or a loss as it is outside of tests."""
    if inspect.isfunction(function):
        return inspect.unwrap(function)(*arguments, **settings)
    return inspect.unwrap(type(function).__call__)(function, *arguments, **settings)


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_tensors_that_would_broadcast_are_refused(name):
    with pytest.raises(ConfigurationError, match=r"has shape \(.*need(s the| the same) shape"):
        OTHER_SHAPES[name]()


@pytest.mark.parametrize("loss", [*LOSSES, ChosenNLL()], ids=repr)
def test_losses_of_pairs_refuse_other_shapes(loss):
    """A column beside a row would make a square, whose mean is a number like any other."""
    for changed in range(6):
        pairs = PairLogProbs(*(COLUMN if number == changed else PER_ROW for number in range(6)))
        with contextlib.suppress(ConfigurationError):
            assert call(loss, pairs).shape == (4,), PairLogProbs._fields[changed]  # a field that it does not read
    with pytest.raises(ConfigurationError, match=r"chosen has shape \(4, 1\)"):
        call(loss, PairLogProbs(*[COLUMN] * 6))


@pytest.mark.parametrize("score", [token_logprobs, token_cross_entropy])
def test_logits_and_ids_are_aligned(score):
    with pytest.raises(ConfigurationError, match=r"shape \(3, 4, 9\) and \w+ \(4, 3\)"):
        call(score, torch.zeros(3, 4, 9), IDS)


@pytest.mark.parametrize("score", [linear_logprob, linear_cross_entropy])
def test_hidden_states_and_ids_are_aligned(score):
    with pytest.raises(ConfigurationError, match=r"hidden has shape \(3, 4, 9\) and targets \(4, 3\)"):
        call(score, torch.zeros(3, 4, 9), torch.zeros(5, 9), IDS)


@pytest.mark.parametrize(
    "uniforms", [torch.full((4, 1), 0.5), torch.full((1,), 0.5), torch.tensor(0.5)], ids=["column", "one", "scalar"]
)
def test_a_draw_needs_a_number_for_each_row(uniforms):
    with pytest.raises(ConfigurationError, match="each of the 4 rows"):
        call(draw, ROWS, uniforms)
    with pytest.raises(ConfigurationError, match=r"\[batch, vocab\]"):
        call(draw, ROWS[0], torch.rand(1))


def test_rows_over_ranks_name_their_axes(monkeypatch):
    """Refused before any rank waits for another."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    with pytest.raises(ConfigurationError, match=r"shape \(4,\), and \[batch, seq, \.\.\.\] is needed"):
        call(shard_sequence, PER_ROW, None)
    with pytest.raises(ConfigurationError, match=r"\[batch, heads, queries, head_dim\]"):
        call(context_parallel_attention, *[torch.ones(2, 3, 8)] * 3, group=None)
    heads, local = torch.ones(2, 4, 6, 8), torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ConfigurationError, match=r"document_ids has shape \(2, 6\).*\(2, 12\)"):
        call(context_parallel_attention, heads, heads, heads, group=None, document_ids=local)
