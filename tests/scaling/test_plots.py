"""Pictures hold what they claim to show; how they look was judged by eye."""

import sys

import numpy as np
import pytest

from lightning_lm.errors import MissingDependencyError
from lightning_lm.scaling import Curve, Estimator, fit_isoflop, fit_parametric, hold_out
from lightning_lm.scaling.plots.fits import collapsed_curves, figures, isoflop_curves, write_figures

BUDGETS = np.geomspace(1e19, 1e21, 4)


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_every_picture_is_written(hoffmann, tmp_path):
    points = hoffmann.isoflop(BUDGETS, noise=0.002)
    tokens = np.geomspace(1e8, 1e10, 20)
    curves = [Curve(parameters=N, tokens=tokens, loss=hoffmann.loss(N, tokens)) for N in (1e8, 1e9)]
    drawn = figures(points, fit_parametric(points, Estimator(num_bootstraps=20)), curves)
    assert set(drawn) == {"isoflop", "frontier", "contours", "residuals", "curves"}
    paths = write_figures(tmp_path / "new", drawn)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert set(figures(points, fit_isoflop(points))) == {"isoflop", "frontier", "residuals"}


def test_each_budget_stands_beside_its_curve_and_the_minima_are_where_they_should_be(hoffmann):
    figure = isoflop_curves(hoffmann.isoflop(BUDGETS, width=2.0))
    assert [text for text in texts(figure) if "FLOPs" in text] == [
        "1e+19 FLOPs",  # as in the tables
        "4.64e+19 FLOPs",
        "2.15e+20 FLOPs",
        "1e+21 FLOPs",
    ]
    stars = next(line for line in figure.axes[0].lines if line.get_marker() == "*")
    assert stars.get_xdata() == pytest.approx(hoffmann.optimal_size(BUDGETS), rel=0.02)


def test_exponents_stand_beside_the_frontier(hoffmann):
    points = hoffmann.isoflop(BUDGETS)
    drawn = figures(points, fit_parametric(points, Estimator(num_bootstraps=20)))
    labels = " ".join(texts(drawn["frontier"]))
    assert "parameters ~ $C^{0.45}$" in labels
    assert "tokens ~ $C^{0.55}$" in labels


def test_runs_predictions_and_held_out_runs_are_drawn(hoffmann):
    points = hoffmann.isoflop(BUDGETS, noise=0.002)

    def fitted(some):
        return fit_parametric(some, Estimator(num_bootstraps=20))

    fit, held = fitted(points), hold_out(points, fitted)
    optimum = fit.optimal(1e23)
    drawn = figures(points, fit, held_out=held, predicted=[optimum])
    axes = drawn["frontier"].axes[0]
    stars = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "*"]
    assert stars == [[1e23, optimum.parameters.value], [1e23, optimum.tokens.value]]
    runs = [line.get_xydata() for line in axes.lines if line.get_marker() == "o"]
    assert np.array_equal(runs[0], np.column_stack([points.flops, points.parameters]))
    assert axes.get_xlim()[1] == pytest.approx(2e23)  # no empty third beside the lines
    rings = {name: [line for line in drawn[name].axes[0].lines if line.get_markersize() == 9] for name in drawn}
    assert {name: len(found) for name, found in rings.items()} == {
        "frontier": 0, "residuals": 7, "isoflop": 7, "contours": 7,
    }  # fmt: skip
    errors = [float(ring.get_ydata()[0]) for ring in rings["residuals"]]
    assert errors == pytest.approx([100 * (run.loss / run.predicted.value - 1) for run in held])
    bar = drawn["residuals"].axes[1]
    assert (bar.get_ylabel(), bar.get_yscale()) == ("parameters", "log")


def test_noisy_curves_are_smoothed_before_they_are_divided():
    tokens = np.arange(1, 501) * 1e4
    noise = np.random.default_rng(0).standard_normal((2, 500))
    curves = [Curve(parameters=n, tokens=tokens, loss=20 / tokens**0.2 + 0.05 * z) for n, z in enumerate(noise, 1)]
    left, right = collapsed_curves(curves).axes
    for line in left.lines:
        late = line.get_xdata() > 1e6
        away = (line.get_ydata() - 20 / line.get_xdata() ** 0.2)[late]
        assert 0 < np.abs(away).max() < 0.05  # bins of 30 batches and more: a sixth of the noise
    first, second = (np.interp(np.linspace(0.1, 0.9, 20), *line.get_data()) for line in right.lines)
    assert first == pytest.approx(second, rel=0.03)
    whole = collapsed_curves([Curve(parameters=1, tokens=[1e4, 2e4], loss=[3, 2])])  # too few to be smoothed
    assert whole.axes[0].lines[0].get_ydata() == pytest.approx([3, 2])


def test_without_matplotlib_the_command_to_install_it_is_told(hoffmann, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    points = hoffmann.isoflop(BUDGETS)
    with pytest.raises(MissingDependencyError, match=r"lightning-lm\[scaling\]"):
        figures(points, fit_parametric(points, Estimator(num_bootstraps=0)))
