"""Approaches 1 and 2 against the closed form of the frontier, with the bias that parabolas are known to have."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.scaling import (
    AnnealingRun,
    Curve,
    Estimator,
    IsoFlop,
    Points,
    compare_forms,
    fit_annealing,
    fit_envelope,
    fit_general,
    fit_isoflop,
    fit_kaplan,
    fit_parametric,
    hold_out,
    optimal_with_inference,
    parabolas,
)

BUDGETS = np.geomspace(6e18, 3e21, 9)


def parabola_by_numpy(points, rows):
    c, b, a = np.polynomial.polynomial.polyfit(np.log(points.parameters[rows]), points.loss[rows], 2)
    return -b / (2 * a), c - b * b / (4 * a), a


def test_parabolas_are_those_of_a_polynomial_fit(hoffmann):
    points = hoffmann.isoflop(BUDGETS, noise=0.003)
    curves = parabolas(points)
    assert [curve.flops for curve in curves] == pytest.approx(BUDGETS)
    for curve in curves:
        x, y, a = parabola_by_numpy(points, curve.rows)
        assert (curve.log_size, curve.loss, curve.curvature) == pytest.approx((x, y, a), rel=1e-6)


def test_the_frontier_is_nearly_the_closed_form_and_its_bias_grows_with_the_sweep(hoffmann):
    errors, biases = [], []
    for width in (2.0, 4.0, 16.0):
        fit = fit_isoflop(hoffmann.isoflop(BUDGETS, width=width, sizes=9), IsoFlop(num_bootstraps=5))
        errors.append(fit.optimal(1e24).parameters.value / hoffmann.optimal_size(1e24) - 1)
        biases += [finding.kind == "bias" for finding in fit.findings if finding.kind == "bias"]
        assert fit.values["a"] == pytest.approx(0.28 / 0.62, rel=1e-3)  # the same bias at every budget
        assert fit.values["E"] == pytest.approx(1.69, rel=1e-3)
    assert 0 < errors[0] < 0.005 < errors[1] < 0.02 < errors[2] < 0.07
    assert len(biases) == 1  # only the widest sweep is remarked upon


def test_intervals_of_the_frontier_hold_the_truth(hoffmann):
    budgets, hits = BUDGETS[::2], np.zeros(3)
    best = hoffmann.optimal_size(1e22)
    truth = (0.28 / 0.62, best, hoffmann.loss(best, 1e22 / 6 / best))
    for seed in range(200):
        fit = fit_isoflop(hoffmann.isoflop(budgets, noise=0.003, seed=seed), IsoFlop(num_bootstraps=100))
        optimum = fit.optimal(1e22)
        held = (fit.intervals()["a"], optimum.parameters, optimum.loss)
        hits += [value in interval for value, interval in zip(truth, held, strict=True)]
    assert np.all((hits >= 0.9 * 200) & (hits <= 0.985 * 200)), hits


def test_one_grid_of_sizes_for_all_budgets_is_remarked_upon(hoffmann):
    sizes = np.geomspace(1.5e8, 2e10, 9)
    N, C = (axis.ravel() for axis in np.meshgrid(sizes, np.geomspace(1e18, 1e22, 9)))
    fit = fit_isoflop(Points.of(N, C / 6 / N, hoffmann.loss(N, C / 6 / N)), IsoFlop(num_bootstraps=0))
    messages = [finding.message for finding in fit.findings if finding.kind == "edge"]
    assert any("add smaller ones" in message for message in messages)
    assert fit.values["a"] != pytest.approx(0.28 / 0.62, rel=0.02)


def test_too_few_budgets_are_refused(hoffmann):
    with pytest.raises(DataError, match="Only 2 budgets"):
        fit_isoflop(hoffmann.isoflop(BUDGETS[:2]))


def test_minima_below_zero_are_none():
    N, C = (column.ravel() for column in np.meshgrid(np.geomspace(1e6, 1e8, 3), np.geomspace(1e15, 1e17, 3)))
    steep = np.tile([9.0, 5.0, 2.0], 3)  # the parabola through them has its lowest point far to the right
    assert all(curve.curvature > 0 > curve.loss for curve in parabolas(Points.of(N, C / 6 / N, steep)))
    assert not any(curve.has_minimum for curve in parabolas(Points.of(N, C / 6 / N, steep)))
    with pytest.raises(DataError, match="Only 0 budgets"):
        fit_isoflop(Points.of(N, C / 6 / N, steep))


def curves_of(hoffmann, number, noise=0.0):
    scatter = np.random.default_rng(0).standard_normal(number)
    tokens = np.geomspace(1e8, 1e13, 300)
    return [
        Curve(parameters=N, tokens=tokens, loss=hoffmann.loss(N, tokens) * np.exp(noise * e))
        for N, e in zip(np.geomspace(2e7, 4e10, number), scatter, strict=True)
    ]


def test_the_envelope_is_nearly_the_closed_form(hoffmann):
    fit = fit_envelope(curves_of(hoffmann, 60))
    assert fit.values["a"] == pytest.approx(0.28 / 0.62, abs=0.02)
    optimum = fit.optimal(1e21)
    assert optimum.parameters.value == pytest.approx(hoffmann.optimal_size(1e21), rel=0.15)
    N = hoffmann.optimal_size(1e21)
    assert optimum.loss.value == pytest.approx(hoffmann.loss(N, 1e21 / 6 / N), rel=2e-3)
    noisy = fit_envelope(curves_of(hoffmann, 30, noise=0.003))
    assert noisy.intervals()["a"].low < noisy.values["a"] < noisy.intervals()["a"].high
    with pytest.raises(DataError, match="at least three"):
        fit_envelope(curves_of(hoffmann, 2))


def test_an_envelope_of_one_model_is_refused(hoffmann):
    tokens = np.geomspace(1e9, 1e11, 30)
    curves = [
        Curve(parameters=N, tokens=tokens, loss=tokens**-0.1 * f) for N, f in ((1e7, 9), (1.01e7, 99), (1e9, 999))
    ]
    with pytest.raises(DataError, match="no frontier"):
        fit_envelope(curves)


@pytest.mark.parametrize("served", [0.0, 1e11, 1e13])
def test_the_optimum_with_inference_is_that_of_a_search(hoffmann, served):
    fit = fit_parametric(hoffmann.scattered(60), Estimator(num_bootstraps=20))
    best = optimal_with_inference(fit, 2.2, served)

    def cost(log_size):
        N = np.exp(log_size)
        D = (410.7 / (2.2 - 1.69 - 406.4 / N**0.34)) ** (1 / 0.28)
        return np.log(6 * N * D + 2 * N * served)

    smallest = np.log(406.4 / (2.2 - 1.69)) / 0.34
    found = minimize_scalar(cost, bounds=(smallest + 1e-6, smallest + 9), method="bounded", options={"xatol": 1e-10})
    assert best.parameters.value == pytest.approx(np.exp(found.x), rel=1e-4)
    assert best.total_flops.value == pytest.approx(np.exp(found.fun), rel=1e-8)
    assert hoffmann.loss(best.parameters.value, best.tokens.value) == pytest.approx(2.2)
    assert best.saved == pytest.approx(0, abs=1e-9) if not served else best.saved > 0


def test_the_optimum_with_inference_of_the_general_form_is_that_of_a_search():
    N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 1e10, 8), np.geomspace(2e7, 2e11, 8)))
    fit = fit_general(Points.of(N, D, 1.2 + (3e3 / N**0.6 + 2e4 / D**0.7) ** 0.5), Estimator(num_bootstraps=0))

    def cost(log_size):
        tokens = (2e4 / (0.8**2 - 3e3 / np.exp(0.6 * log_size))) ** (1 / 0.7)
        return log_size + np.log(6 * tokens + 2 * 1e12)

    smallest = np.log(3e3 / 0.8**2) / 0.6
    found = minimize_scalar(cost, bounds=(smallest + 1e-6, smallest + 9), method="bounded", options={"xatol": 1e-10})
    best = optimal_with_inference(fit, 2.0, 1e12)
    assert best.parameters.value == pytest.approx(np.exp(found.x), rel=1e-3)
    assert best.total_flops.value == pytest.approx(np.exp(found.fun), rel=1e-4)


def test_the_optimum_with_inference_refuses_what_cannot_be(hoffmann):
    fit = fit_parametric(hoffmann.scattered(60), Estimator(num_bootstraps=0))
    with pytest.raises(ConfigurationError, match=r"floor of the law is 1\.69"):
        optimal_with_inference(fit, 1.5, 1e12)
    with pytest.raises(ConfigurationError, match="negative"):
        optimal_with_inference(fit, 2.2, -1.0)
    with pytest.raises(ConfigurationError, match="KaplanLaw"):
        optimal_with_inference(fit_kaplan(hoffmann.scattered(60), Estimator(num_bootstraps=0)), 2.2, 0.0)


def test_held_out_budgets_are_predicted(hoffmann):
    held = []
    for seed in range(10):
        points = hoffmann.isoflop(BUDGETS, noise=0.003, seed=seed)
        held += hold_out(points, lambda some: fit_parametric(some, Estimator(num_bootstraps=100)), num_budgets=2)
    assert len(held) == 140
    assert min(run.flops for run in held) == pytest.approx(BUDGETS[-2])
    assert max(abs(run.error) for run in held) < 0.02
    assert (
        sum(run.loss in run.predicted for run in held) >= 0.85 * 140
    )  # runs of one repetition share the errors of its law
    with pytest.raises(DataError, match="cannot spare"):
        hold_out(points, fit_parametric, num_budgets=8)


def test_the_form_that_runs_follow_extrapolates_best(hoffmann):
    forms = {
        "parametric": lambda points: fit_parametric(points, Estimator(num_bootstraps=20)),
        "kaplan": lambda points: fit_kaplan(points, Estimator(num_bootstraps=20)),
        "broken": lambda points: fit_parametric(points.where(np.arange(3))),
    }
    points = hoffmann.isoflop(BUDGETS[:5], noise=1e-4)
    tests = compare_forms(points, forms)
    assert [test.method for test in tests] == ["parametric", "kaplan"]
    assert tests[0].error == pytest.approx(np.sqrt(np.mean([one.error**2 for one in tests[0].held])))
    assert tests[0].inside >= 5
    assert len(tests[0].held) == 7
    bent = ((6e9 / points.parameters) ** 0.7 + 2e10 / points.tokens) ** 0.1
    of_kaplan = compare_forms(Points.of(points.parameters, points.tokens, bent), forms)
    assert [test.method for test in of_kaplan] == ["kaplan", "parametric"]


def rates(number, decay):
    kept = round(number * (1 - decay))
    return np.concatenate([np.ones(kept), np.linspace(1, 0.05, number - kept)])


def annealed_loss(values, at):
    """Tissue et al. 2024, arXiv:2408.11029, equation 1, as two loops."""
    losses = []
    for step in at:
        s2 = 0.0
        for i in range(1, step):
            s2 += sum((values[k - 1] - values[k]) * 0.99 ** (i - k) for k in range(1, i + 1))
        losses.append(2.5 + 8 / values[:step].sum() ** 0.4 - 0.02 * s2)
    return np.array(losses)


def test_the_end_of_a_schedule_that_was_not_run():
    runs = []
    for number, decay in ((150, 0.2), (200, 0.5)):
        steps = np.arange(20, number + 1, 10)
        runs.append(
            AnnealingRun(rates=rates(number, decay), steps=steps, loss=annealed_loss(rates(number, decay), steps))
        )
    fit = fit_annealing(runs, Estimator(num_bootstraps=20), memory=0.99)
    assert fit.values == pytest.approx({"E": 2.5, "A": 8.0, "alpha": 0.4, "C": 0.02}, rel=1e-5)
    longer = rates(250, 0.3)
    predicted = fit.predict(longer)
    assert predicted.value == pytest.approx(annealed_loss(longer, [250])[0], rel=1e-6)
    flat = AnnealingRun(rates=np.ones(100), steps=np.arange(1, 100), loss=np.linspace(3, 2, 99))
    with pytest.raises(DataError, match="never fall"):
        fit_annealing([flat])
