"""Preference losses against their equations, written out in plain Python floats."""

import math
from collections.abc import Callable

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.preference import (
    IPO,
    NCA,
    APODown,
    APOZero,
    ChosenNLL,
    Hinge,
    PairLogProbs,
    PreferenceLoss,
    Robust,
    Sigmoid,
    SimPO,
    WeightedLosses,
    bradley_terry_loss,
)
from lightning_lm.parts import Part

ROWS = [(-3.0, -7.0, -4.0, -5.0, 3, 2), (-20.0, -2.0, -8.0, -6.0, 7, 1), (-1.0, -1.0, -1.0, -1.0, 1, 5)]
PAIRS = PairLogProbs(*(torch.tensor(column, dtype=torch.float64) for column in zip(*ROWS, strict=True)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return math.log(sigmoid(x))


Oracle = Callable[[float, float, float, float, int, int], float]

CASES: list[tuple[PreferenceLoss, Oracle]] = [
    (Sigmoid(beta=0.3), lambda c, r, rc, rr, lc, lr: -log_sigmoid(0.3 * ((c - rc) - (r - rr)))),
    (
        Sigmoid(beta=0.3, label_smoothing=0.2),
        lambda c, r, rc, rr, lc, lr: (
            -0.8 * log_sigmoid(0.3 * ((c - rc) - (r - rr))) - 0.2 * log_sigmoid(-0.3 * ((c - rc) - (r - rr)))
        ),
    ),
    (
        Sigmoid(beta=0.3, length_normalize=True),
        lambda c, r, rc, rr, lc, lr: -log_sigmoid(0.3 * ((c - rc) / lc - (r - rr) / lr)),
    ),
    (
        Robust(beta=0.3, flip_rate=0.2),
        lambda c, r, rc, rr, lc, lr: (
            (-0.8 * log_sigmoid(0.3 * ((c - rc) - (r - rr))) + 0.2 * log_sigmoid(-0.3 * ((c - rc) - (r - rr)))) / 0.6
        ),
    ),
    (IPO(beta=0.3), lambda c, r, rc, rr, lc, lr: ((c - rc) / lc - (r - rr) / lr - 1 / 0.6) ** 2),
    (Hinge(beta=0.3), lambda c, r, rc, rr, lc, lr: max(0.0, 1 - 0.3 * ((c - rc) - (r - rr)))),
    (
        NCA(beta=0.3),
        lambda c, r, rc, rr, lc, lr: (
            -log_sigmoid(0.3 * (c - rc)) - 0.5 * log_sigmoid(-0.3 * (c - rc)) - 0.5 * log_sigmoid(-0.3 * (r - rr))
        ),
    ),
    (APOZero(beta=0.3), lambda c, r, rc, rr, lc, lr: 1 - sigmoid(0.3 * (c - rc)) + sigmoid(0.3 * (r - rr))),
    (
        APODown(beta=0.3),
        lambda c, r, rc, rr, lc, lr: sigmoid(0.3 * (c - rc)) + 1 - sigmoid(0.3 * ((c - rc) - (r - rr))),
    ),
    (SimPO(beta=2.0, target_margin=0.5), lambda c, r, rc, rr, lc, lr: -log_sigmoid(2 * c / lc - 2 * r / lr - 0.5)),
    (ChosenNLL(), lambda c, r, rc, rr, lc, lr: -c / lc),
]


@pytest.mark.parametrize(("loss", "oracle"), CASES, ids=lambda value: type(value).__name__)
def test_losses_follow_their_equations(loss: PreferenceLoss, oracle: Oracle) -> None:
    expected = torch.tensor([oracle(*row) for row in ROWS], dtype=torch.float64)
    torch.testing.assert_close(loss(PAIRS), expected, rtol=1e-12, atol=1e-12)
    assert Part.from_dict(loss.to_dict()) == loss


def test_sigmoid_starts_at_ln_2() -> None:
    same = PairLogProbs(*(torch.tensor([v]) for v in (-3.0, -9.0, -3.0, -9.0, 4.0, 4.0)))
    assert Sigmoid()(same).item() == pytest.approx(math.log(2), abs=1e-7)


def test_robust_is_unbiased_under_flips() -> None:
    """E[robust loss over flipped labels] is the clean DPO loss: the defining property of the paper."""
    swapped = PairLogProbs(PAIRS.rejected, PAIRS.chosen, PAIRS.reference_rejected, PAIRS.reference_chosen, *PAIRS[4:])
    loss = Robust(beta=0.3, flip_rate=0.2)
    torch.testing.assert_close(0.8 * loss(PAIRS) + 0.2 * loss(swapped), Sigmoid(beta=0.3)(PAIRS))


def test_extreme_margins_are_finite() -> None:
    far = PairLogProbs(
        *(torch.tensor([v], requires_grad=i < 2) for i, v in enumerate((-1e6, -1.0, -1.0, -1e6, 9.0, 9.0)))
    )
    for loss, _ in CASES:
        value = loss(far)
        assert torch.isfinite(value).all()
        assert all(
            torch.isfinite(g).all()
            for g in torch.autograd.grad(value.sum(), far[:2], allow_unused=True)
            if g is not None
        )


def test_weighted_losses_sum_and_know_whether_a_reference_is_needed() -> None:
    both = WeightedLosses(losses=(Sigmoid(), ChosenNLL()), weights=(1.0, 0.2))
    torch.testing.assert_close(both(PAIRS), Sigmoid()(PAIRS) + 0.2 * ChosenNLL()(PAIRS))
    assert both.needs_reference
    assert not WeightedLosses(losses=(SimPO(), ChosenNLL()), weights=(1.0, 1.0)).needs_reference
    with pytest.raises(ConfigurationError, match="2 losses need as many weights, got 1"):
        WeightedLosses(losses=(SimPO(), ChosenNLL()), weights=(1.0,))
    with pytest.raises(ConfigurationError, match=r"below 0\.5"):
        Robust(flip_rate=0.5)


def test_bradley_terry_with_margin_and_centring() -> None:
    chosen, rejected, margin = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, -1.0], [1.0, 3.0], [0.5, 0.0]))
    loss = bradley_terry_loss(chosen, rejected, margin=margin, center_coefficient=0.01)
    expected = [-log_sigmoid(0.5) + 0.01 * 9, -log_sigmoid(-4.0) + 0.01 * 4]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    shifted = bradley_terry_loss(chosen + 5, rejected + 5, margin=margin)
    torch.testing.assert_close(shifted, bradley_terry_loss(chosen, rejected, margin=margin))
