"""Schedules against torch's schedulers and closed forms; a run is extended or cooled down by another schedule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lm.errors import ConfigurationError
from lightning_lm.optim import WSD, Constant, Cosine, InverseSquareRoot, Linear, Schedule, ScheduledLR
from lightning_lm.parts import Part

ALL = [Constant, Cosine, InverseSquareRoot, Linear, WSD]


def torch_curve(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    curve = []
    for _ in range(steps):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return curve


def curve(schedule: Schedule, steps: int, horizon: int) -> list[float]:
    return [schedule.multiplier(step, horizon) for step in range(steps)]


def test_cosine_is_torchs():
    expected = torch_curve(
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1), 51
    )
    assert curve(Cosine(final=0.1), 51, 50) == pytest.approx(expected, rel=1e-9)


def test_linear_is_torchs():
    expected = torch_curve(lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=40), 41)
    assert curve(Linear(final=0.2), 41, 40) == pytest.approx(expected, rel=1e-9)


def test_wsd_by_hand():
    schedule = WSD(warmup=4, decay=5, final=0.5)
    expected = [0.2, 0.4, 0.6, 0.8] + [1.0] * 12 + [0.9, 0.8, 0.7, 0.6, 0.5]
    assert curve(schedule, 21, 20) == pytest.approx(expected)


def test_inverse_square_root_by_hand():
    schedule = InverseSquareRoot(warmup=2, timescale=100)
    assert schedule.multiplier(2, 0) == 1.0
    assert schedule.multiplier(302, 0) == pytest.approx(0.5)


def test_a_warmup_below_one_is_a_share_of_the_horizon():
    assert curve(Constant(warmup=0.1), 50, 50) == curve(Constant(warmup=5), 50, 50)


@pytest.mark.parametrize("kind", ALL)
@given(
    step=st.integers(0, 10**12),
    horizon=st.integers(0, 10**12),
    warmup=st.floats(0, 10**6, allow_subnormal=False),
)
def test_factors_stay_between_zero_and_one(kind, step, horizon, warmup):
    factor = kind(warmup=warmup).multiplier(step, horizon)
    assert 0 <= factor <= 1
    assert math.isfinite(factor)


@pytest.mark.parametrize("kind", ALL)
def test_the_first_step_of_a_warmup_moves(kind):
    assert 0 < kind(warmup=10).multiplier(0, 100) < kind(warmup=10).multiplier(9, 100) < 1


@pytest.mark.parametrize("kind", ALL)
def test_survives_a_checkpoint(kind):
    schedule = kind(warmup=7)
    assert Part.from_dict(schedule.to_dict()) == schedule


def test_a_negative_warmup_is_refused():
    with pytest.raises(ConfigurationError, match="-1"):
        Constant(warmup=-1)


def optimizer_with_two_groups() -> torch.optim.Optimizer:
    params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    return torch.optim.SGD([{"params": params[:1], "lr": 1.0}, {"params": params[1:], "lr": 0.1}])


def rates(scheduler: ScheduledLR, steps: int) -> list[list[float]]:
    """The learning rates of each group, step by step."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return [list(group) for group in zip(*found, strict=True)]


def test_every_group_keeps_its_own_peak():
    scheduler = ScheduledLR(optimizer_with_two_groups(), Linear(), horizon=4)
    first, second = rates(scheduler, 4)
    assert first == pytest.approx([1, 0.75, 0.5, 0.25])
    assert second == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert scheduler.get_last_lr() == [0.0, 0.0]


def test_nothing_of_the_horizon_is_saved():
    scheduler = ScheduledLR(optimizer_with_two_groups(), Linear(), horizon=4)
    rates(scheduler, 3)
    assert scheduler.state_dict() == {"last_epoch": 3}


def test_resuming_takes_the_new_schedule_and_the_new_peaks():
    first = ScheduledLR(optimizer_with_two_groups(), Linear(), horizon=4)
    rates(first, 2)
    optimizer = optimizer_with_two_groups()
    optimizer.param_groups[1].update(lr=0.3, momentum=0.9)
    second = ScheduledLR(optimizer, Linear(), horizon=8)
    optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert optimizer.param_groups[1]["momentum"] == 0.9
    slow, fast = rates(second, 2)
    assert slow == pytest.approx([0.75, 0.625])
    assert fast == pytest.approx([0.225, 0.1875])


def test_positions_may_be_counted_in_tokens():
    tokens = 0
    scheduler = ScheduledLR(optimizer_with_two_groups(), Linear(), horizon=1000, position=lambda: tokens)
    seen = []
    for batch in (100, 400, 500):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        tokens += batch
        scheduler.step()
    assert seen == pytest.approx([1.0, 0.9, 0.5])
