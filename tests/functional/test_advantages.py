"""Advantages against naive loops in plain Python, and the traps of groups without variance."""

import statistics

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.advantages import (
    GroupAdvantage,
    MaxRLAdvantage,
    RewardFilter,
    explained_variance,
    gae,
    group_advantages,
    whiten,
)

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.2, 0.9, 0.4, 0.1], [0.0, 0.0, 0.0, 3.0]]


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_every_baseline_and_scale(baseline: str, scale: str) -> None:
    everything = [reward for row in REWARDS for reward in row]
    expected = []
    for row in REWARDS:
        divisor = {"group": statistics.stdev(row), "batch": statistics.stdev(everything), "none": None}[scale]
        for i, reward in enumerate(row):
            others = row[:i] + row[i + 1 :]
            base = {
                "group": statistics.mean(row),
                "leave_one_out": statistics.mean(others),
                "batch": statistics.mean(everything),
                "none": 0.0,
            }[baseline]
            expected.append((reward - base) / (1.0 if divisor is None else divisor + 1e-4))
    ours = GroupAdvantage(baseline=baseline, scale=scale)(torch.tensor(REWARDS))
    torch.testing.assert_close(ours.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.7, 0.1, 1e-30, 1e30])
def test_identical_rewards_teach_exactly_nothing(baseline: str, scale: str, reward: float) -> None:
    rewards = torch.full((4, 8), reward)
    assert torch.equal(group_advantages(rewards, baseline=baseline, scale=scale, eps=1e-9), torch.zeros(4, 8))


def test_one_sample_per_prompt_is_refused_where_a_group_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="1 sample per prompt"):
        group_advantages(torch.ones(4, 1))
    alone = group_advantages(torch.tensor([[1.0], [3.0]]), baseline="batch", scale="none")
    assert alone.tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "mean", "none"])
def test_a_missing_reward_moves_no_mean_and_no_deviation(baseline: str, scale: str) -> None:
    nan = float("nan")
    rows = [[nan, 19.0, 16.0, 18.0], [2.0, nan, nan, 5.0], [3.0, 4.0, 5.0, 9.0]]
    known = [reward for row in rows for reward in row if reward == reward]
    found = group_advantages(torch.tensor(rows), baseline=baseline, scale=scale, eps=0.0)
    for row, advantages in zip(rows, found.tolist(), strict=True):
        present = [reward for reward in row if reward == reward]
        divisors = {"group": statistics.stdev(present), "batch": statistics.stdev(known), "none": 1.0}
        divisor = {**divisors, "mean": statistics.mean(present)}[scale]
        for reward, advantage in zip(row, advantages, strict=True):
            if reward != reward:
                assert advantage == 0.0
                continue
            others = (sum(present) - reward) / (len(present) - 1)
            base = {"group": statistics.mean(present), "leave_one_out": others, "batch": statistics.mean(known)}
            assert advantage == pytest.approx((reward - base.get(baseline, 0.0)) / divisor, rel=1e-5, abs=1e-5)
    if (baseline, scale) == ("group", "group"):
        assert found[0, 1].item() == pytest.approx(0.873, abs=5e-4)


def test_groups_of_one_known_reward_or_none_teach_nothing() -> None:
    nan = float("nan")
    for scale in ("group", "mean", "none"):
        rewards = torch.tensor([[1.0, nan], [nan, nan], [0.7, 0.7]])
        assert torch.equal(group_advantages(rewards, scale=scale), torch.zeros(3, 2))


def test_maximum_likelihood_reinforcement_learning() -> None:
    found = MaxRLAdvantage()(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]), rtol=0, atol=1e-5)
    rare = MaxRLAdvantage()(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(rare, torch.tensor([[3.0, -1.0, -1.0, -1.0]]), rtol=0, atol=1e-4)
    with pytest.raises(ConfigurationError, match="-1 is below 0"):
        MaxRLAdvantage()(torch.tensor([[1.0, -1.0]]))


def test_a_filter_keeps_what_earned_enough() -> None:
    rewards = torch.tensor([[0.9, 1.0, 2.0], [float("nan"), -float("inf"), 0.0]])
    kept = RewardFilter(threshold=1.0)(rewards)
    assert kept[:, 1:].tolist()[0] == [1.0, 1.0]
    assert kept.isnan().tolist() == [[True, False, False], [True, True, True]]


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 as a double sum."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def test_gae_steps_over_masked_tokens() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 7), torch.randn(3, 7)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 0]]).bool()
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for row in range(3):
        kept = mask[row].nonzero()[:, 0].tolist()
        expected = naive_gae([rewards[row, i].item() for i in kept], [values[row, i].item() for i in kept], 0.9, 0.8)
        torch.testing.assert_close(advantages[row, kept], torch.tensor(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(returns[row, kept], torch.tensor(expected) + values[row, kept], rtol=1e-5, atol=1e-5)
    assert torch.equal(advantages[~mask], torch.zeros(int((~mask).sum())))


def test_gae_at_its_ends() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.2, 0.1]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    monte_carlo, returns = gae(rewards, values, everything, lam=1.0)
    torch.testing.assert_close(monte_carlo, torch.tensor([[0.5, 0.8, 0.9]]))
    torch.testing.assert_close(returns, torch.ones(1, 3))
    one_step, _ = gae(rewards, values, everything, lam=0.0)
    torch.testing.assert_close(one_step, torch.tensor([[-0.3, -0.1, 0.9]]))


def test_whiten_centres_and_scales() -> None:
    torch.manual_seed(0)
    values, mask = torch.randn(4, 6) * 3 + 100, torch.rand(4, 6) > 0.3
    out = whiten(values, mask)
    kept = out[mask].double()
    assert abs(kept.mean()) < 1e-6
    assert kept.std().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(out[~mask], torch.zeros(int((~mask).sum())))
    unshifted = whiten(values, mask, shift_mean=False)
    assert unshifted[mask].mean().item() == pytest.approx(values[mask].mean().item(), rel=1e-6)


def test_whiten_over_two_ranks_equals_one() -> None:
    torch.manual_seed(0)
    values, mask = torch.randn(6, 5), torch.rand(6, 5) > 0.2
    halves = [slice(0, 2), slice(2, 6)]
    sums: list[list[torch.Tensor]] = [[], []]
    for half in halves:  # first run: collect what each rank would send

        def collect(local: torch.Tensor, store: list[list[torch.Tensor]] = sums) -> torch.Tensor:
            calls = 0 if local[0] > 0 else 1
            store[calls].append(local)
            return local

        whiten(values[half], mask[half], all_reduce=collect)
    mean = sums[0][0][1].add(sums[0][1][1]) / (sums[0][0][0] + sums[0][1][0])
    squares = ((values.double() - mean).masked_fill(~mask, 0.0)).square().sum()
    replies = [
        torch.stack([a + b for a, b in zip(*sums[0], strict=True)]),
        torch.tensor([0.0, 0.0, squares.item()]).double(),
    ]
    for half in halves:
        answers = iter(replies)
        ours = whiten(values[half], mask[half], all_reduce=lambda _, answers=answers: next(answers))
        torch.testing.assert_close(ours, whiten(values, mask)[half], rtol=1e-6, atol=1e-6)


def test_explained_variance() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[True, True, True, False]])
    assert explained_variance(returns.clone(), returns, mask).item() == 1.0
    assert explained_variance(torch.full((1, 4), 7.0), returns, mask).item() == 0.0
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(1, 4), mask).item() == 0.0
    assert explained_variance(returns, returns, torch.zeros_like(mask)).item() == 0.0
