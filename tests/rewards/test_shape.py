"""The form and the length of answers."""

import pytest

from lightning_lm.errors import ConfigurationError
from lightning_lm.rewards import FormatTags, LengthReward, OverlongPenalty


def test_format_tags() -> None:
    texts = [
        "<think>a\nb</think>\n<answer>7</answer>\n",
        "<answer>7</answer><think>a</think>",
        "<think>a</think> so <answer>7</answer>",
        "<think>a</think><answer>7</answer><answer>8</answer>",
        "<think>a<think></think></think><answer>7</answer>",
        "",
    ]
    assert FormatTags()(prompts=texts, completions=texts) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_long_unfinished_text_is_read_in_linear_time() -> None:
    assert FormatTags()(prompts=[""], completions=["<think>" + "a<" * 200_000]) == [0.0]


def test_length_reward_is_a_tent() -> None:
    texts = ["", "ab", "abcd", "a" * 8, "a" * 100]
    assert LengthReward(target=4)(prompts=texts, completions=texts) == [0.0, 0.5, 1.0, 0.0, 0.0]
    with pytest.raises(ConfigurationError, match="target=0"):
        LengthReward(target=0)


def test_overlong_penalty_of_dapo() -> None:
    ids = [[0] * n for n in (0, 12, 14, 16, 17)]
    rewards = OverlongPenalty(max_tokens=16, buffer=4)(prompts=[""] * 5, completions=[""] * 5, completion_ids=ids)
    assert rewards == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ConfigurationError, match="buffer=0"):
        OverlongPenalty(max_tokens=16, buffer=0)
