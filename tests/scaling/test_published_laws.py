"""Constants of published fits, from the tables and sentences of their papers."""

import numpy as np
import pytest

from lightning_lm.scaling import (
    Estimator,
    IsoFlop,
    Points,
    fit_data_constrained,
    fit_isoflop,
    fit_kaplan,
    fit_parametric,
)

POINT_ONLY = Estimator(num_bootstraps=0)
SIZES = (400e6, 1e9, 10e9, 67e9, 175e9, 280e9, 520e9, 1e12, 10e12)
BUDGETS = {
    # Hoffmann et al. 2022, arXiv:2203.15556, tables 3 and A3: FLOPs for which these sizes are optimal, and the exponent
    # "a" of table 2. 175 billion by approach 3 is printed as 1.26e+24, between 1.71e+24 and 3.52e+25; the tokens beside
    # it, 12.0 trillion, make it 1.26e+25.
    1: ((1.92e19, 1.21e20, 1.23e22, 5.76e23, 3.85e24, 9.90e24, 3.43e25, 1.27e26, 1.30e28), 0.50),
    2: ((1.84e19, 1.20e20, 1.32e22, 6.88e23, 4.54e24, 1.18e25, 4.19e25, 1.59e26, 1.75e28), 0.49),
    3: ((2.21e19, 1.62e20, 2.46e22, 1.71e24, 1.26e25, 3.52e25, 1.36e26, 5.65e26, 8.55e28), 0.46),
}
LAWS = {
    # E, A, alpha, B, beta and the exponent of the size: Hoffmann et al. as their sources have them before rounding, and
    # Besiroglu et al. 2024, arXiv:2404.10102, table 1, from 240 of the same runs.
    "Hoffmann": (1.6934, 406.4, 0.3392, 410.7, 0.2849, 0.46),
    "Besiroglu": (1.8172, 482.01, 0.3478, 2085.43, 0.3658, 0.51),
}


@pytest.mark.parametrize("approach", BUDGETS)
def test_exponents_of_chinchillas_tables(approach):
    """Around each optimum of the table five runs, on a parabola; which loss the optima have does not matter."""
    flops, exponent = np.array(BUDGETS[approach][0]), BUDGETS[approach][1]
    N, best, C = (np.outer(column, np.ones(5)) for column in (SIZES, 1.7 + 900 / flops**0.15, flops))
    away = np.log(np.geomspace(0.5, 2, 5))
    points = Points.of((N * np.exp(away)).ravel(), (C / 6 / N / np.exp(away)).ravel(), (best + 0.05 * away**2).ravel())
    fit = fit_isoflop(points, IsoFlop(num_bootstraps=0))
    assert round(fit.exponents[0].value, 2) == exponent
    assert round(fit.exponents[1].value, 2) == round(1 - exponent, 2)
    for size, budget in zip(SIZES, flops.tolist(), strict=True):
        assert fit.optimal(budget).parameters.value == pytest.approx(size, rel=0.04)


def runs_of(E, A, alpha, B, beta):
    """The 7 x 9 runs of a sweep from 70M to 16B parameters and 5B to 500B tokens, as Hoffmann et al. span them."""
    N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(7e7, 1.6e10, 7), np.geomspace(5e9, 5e11, 9)))
    return Points.of(N, D, E + A / N**alpha + B / D**beta)


@pytest.mark.parametrize("name", LAWS)
def test_parametric_laws_come_back_from_runs_like_theirs(name):
    *constants, exponent = LAWS[name]
    fit = fit_parametric(runs_of(*constants), POINT_ONLY)
    assert list(fit.values.values()) == pytest.approx(constants, rel=1e-5)
    assert round(fit.exponents[0].value, 2) == exponent


def test_what_the_papers_conclude_from_their_laws():
    """For Gopher's budget the third approach finds 40 billion parameters; its correction, about 20 tokens for each."""
    original, corrected = (fit_parametric(runs_of(*LAWS[name][:5]), POINT_ONLY).optimal(5.76e23) for name in LAWS)
    assert original.parameters.value == pytest.approx(40e9, rel=0.02)
    assert corrected.parameters.value == pytest.approx(70e9, rel=0.05)
    assert corrected.tokens_per_parameter.value == pytest.approx(20, rel=0.15)


MUENNIGHOFF = (np.exp(0.6254804), np.exp(6.255414), 0.3526596, np.exp(7.3049974), 0.3526596, 5.309743, 15.387756)
"""Muennighoff et al. 2023, arXiv:2305.16264, appendix A: E (1.87), A (521), alpha, B (1488), beta, R_N*, R_D*."""


def of_muennighoff(N, U, epochs):
    """Equations 5 and 6, written out. Parameters count in full up to those that are optimal for the unique tokens."""
    E, A, alpha, B, beta, excess, repeats = MUENNIGHOFF
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    optimal = np.minimum(N, (U * G) ** (beta / alpha) * G)
    N_worth = optimal * (1 + excess * -np.expm1(-(N / optimal - 1) / excess))
    D_worth = U * (1 + repeats * -np.expm1(-(epochs - 1) / repeats))
    return E + A / N_worth**alpha + B / D_worth**beta


def test_the_data_constrained_law_comes_back():
    grid = np.meshgrid(np.geomspace(7e6, 9e9, 6), [1e8, 4e8, 1.5e9, 6e9], [1.0, 4, 16, 44])
    N, U, epochs = (axis.ravel() for axis in grid)
    fit = fit_data_constrained(Points.of(N, U * epochs, of_muennighoff(N, U, epochs), unique_tokens=U), POINT_ONLY)
    assert list(fit.values.values()) == pytest.approx(MUENNIGHOFF, rel=1e-4)
    assert [round(fit.values[name], 1) for name in ("R_N", "R_D")] == [5.3, 15.4]  # as section 6 prints them
    assert [round(fit.values[name]) for name in ("A", "B")] == [521, 1488]


def test_kaplans_data_exponent():
    """Kaplan et al. 2020, arXiv:2001.08361, table 2, and D ~ N^0.74 against overfitting, equation 4.4."""
    N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 1.5e9, 8), np.geomspace(2e7, 2e10, 8)))
    fit = fit_kaplan(Points.of(N, D, ((6.4e13 / N) ** (0.076 / 0.103) + 1.8e13 / D) ** 0.103), POINT_ONLY)
    assert round(fit.values["alpha_N"] / fit.values["alpha_D"], 2) == 0.74
