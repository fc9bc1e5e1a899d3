"""Tensors with other axes are refused: taken for the right ones they would give numbers, and wrong ones."""

import inspect

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional import causal_attention, group_advantages, rotate
from lightning_lm.functional.flash_attention import flash_attention as plain_flash_attention
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
