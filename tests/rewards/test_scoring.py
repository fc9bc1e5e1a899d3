"""Several rewards together, some of them broken in every way that foreign code can be."""

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lightning_lm.rewards import ExactAnswer, RewardError, Scoring, score

SAMPLES: dict[str, Any] = {"prompts": ["p"] * 3, "completions": ["a", "bb", "ccc"]}


def length(*, completions: Sequence[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def only_short(*, completions: Sequence[str], **_: Any) -> list[float | None]:
    return [1.0 if len(text) < 2 else None for text in completions]


def fails_on_bb(*, completions: Sequence[str], **_: Any) -> list[float]:
    if "bb" in completions:
        raise KeyError("bb")
    return [5.0] * len(completions)


def test_weighted_sum_skips_what_does_not_apply() -> None:
    table = score([length, only_short], [2.0, 10.0], **SAMPLES)
    assert table.names == ("length", "only_short")
    assert table.totals.tolist() == [12.0, 4.0, 6.0]
    assert np.isnan(table.values[1:, 1]).all()
    assert table.failures == ()


def test_a_sample_that_no_reward_judges_has_no_total() -> None:
    table = score([only_short], [1.0], **SAMPLES)
    assert table.totals[0] == 1.0
    assert np.isnan(table.totals[1:]).all()


def test_a_reward_that_raises_loses_only_the_sample_at_fault() -> None:
    table = score([fails_on_bb, length], [1.0, 1.0], **SAMPLES)
    assert table.totals.tolist() == [6.0, 2.0, 8.0]
    (failure,) = table.failures
    assert (failure.reward, failure.sample) == ("fails_on_bb", 1)
    assert str(failure) == "Reward 'fails_on_bb' failed on sample 1: KeyError: 'bb'. Its completion: 'bb'"
    with pytest.raises(RewardError, match="failed on sample 1: KeyError"):
        score([fails_on_bb], [1.0], **SAMPLES, scoring=Scoring(stop_on_failure=True))


def test_nan_infinity_and_wrong_lengths_are_failures() -> None:
    table = score([lambda **_: [math.nan, math.inf, 1.0]], [1.0], **SAMPLES)
    assert [failure.sample for failure in table.failures] == [0, 1]
    assert table.totals[2] == 1.0
    wrong = score([lambda **_: [1.0]], [1.0], **SAMPLES)
    assert "1 values for 3 samples" in wrong.failures[0].reason
    assert np.isnan(wrong.totals).all()


def test_a_reward_that_hangs_is_left_behind_and_not_called_again() -> None:
    release, calls = threading.Event(), []

    def hangs(completions):
        calls.append(len(completions))
        release.wait()

    table = score([hangs, length], [1.0, 1.0], **SAMPLES, scoring=Scoring(timeout_s=2.0))  # `length` needs it too
    release.set()
    assert calls == [3]  # not once more for each sample, which would wait as often
    assert table.totals.tolist() == [1.0, 2.0, 3.0]
    assert len(table.failures) == 3
    assert "no result within 2.0 s" in table.failures[0].reason


def test_columns_reach_the_reward() -> None:
    table = score([ExactAnswer()], [1.0], **SAMPLES, columns={"answer": ["a", "b", "ccc"]})
    assert table.names == ("ExactAnswer",)
    assert table.totals.tolist() == [1.0, 0.0, 1.0]
