"""Pictures hold what they claim to show; how they look was judged by eye."""

import sys

import numpy as np
import pytest

from lightning_lm.errors import MissingDependencyError
from lightning_lm.scaling import Curve, Estimator, fit_isoflop, fit_parametric
from lightning_lm.scaling.plots import isoflop_curves, pictures, write_pictures

BUDGETS = np.geomspace(1e19, 1e21, 4)


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_every_picture_is_written(hoffmann, tmp_path):
    points = hoffmann.isoflop(BUDGETS, noise=0.002)
    tokens = np.geomspace(1e8, 1e10, 20)
    curves = [Curve(parameters=N, tokens=tokens, loss=hoffmann.loss(N, tokens)) for N in (1e8, 1e9)]
    drawn = pictures(points, fit_parametric(points, Estimator(num_bootstraps=20)), curves)
    assert set(drawn) == {"isoflop", "frontier", "contours", "residuals", "curves"}
    paths = write_pictures(tmp_path / "new", drawn)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert set(pictures(points, fit_isoflop(points))) == {"isoflop", "frontier", "residuals"}


def test_each_budget_stands_beside_its_curve_and_the_minima_are_where_they_should_be(hoffmann):
    figure = isoflop_curves(hoffmann.isoflop(BUDGETS, width=2.0))
    assert [text for text in texts(figure) if "FLOPs" in text] == [
        "1.0e19 FLOPs",
        "4.6e19 FLOPs",
        "2.2e20 FLOPs",
        "1.0e21 FLOPs",
    ]
    stars = next(line for line in figure.axes[0].lines if line.get_marker() == "*")
    assert stars.get_xdata() == pytest.approx(hoffmann.optimal_size(BUDGETS), rel=0.02)


def test_exponents_stand_beside_the_frontier(hoffmann):
    points = hoffmann.isoflop(BUDGETS)
    drawn = pictures(points, fit_parametric(points, Estimator(num_bootstraps=20)))
    labels = " ".join(texts(drawn["frontier"]))
    assert "parameters ~ $C^{0.45}$" in labels
    assert "tokens ~ $C^{0.55}$" in labels


def test_without_matplotlib_the_command_to_install_it_is_told(hoffmann, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    points = hoffmann.isoflop(BUDGETS)
    with pytest.raises(MissingDependencyError, match=r"lightning-lm\[scaling\]"):
        pictures(points, fit_parametric(points, Estimator(num_bootstraps=0)))
