"""The best learning rate of each width on losses whose minima are known, the verb, and the figure."""

import numpy as np
import pytest

from lightning_lm.cli import main
from lightning_lm.errors import DataError
from lightning_lm.scaling import RunLedger, RunRecord, fit_critical_batch, fit_transfer, transfer_of
from lightning_lm.scaling.plots.batch import critical_batch_figure
from lightning_lm.scaling.plots.fits import write_figures
from lightning_lm.scaling.plots.transfer import transfer_figure

WIDTHS, RATES = (16, 32, 64, 128), 0.002 * 2.0 ** np.arange(6)


def loss(width, rate, *, drift, best=0.012):
    """A parabola in the logarithm of the learning rate, whose minimum moves as a power of the width."""
    return 2 + 4 / width**0.3 + 0.1 * np.log(rate / (best * (width / 32) ** drift)) ** 2


def runs(drift, **keys):
    names = {"width": "model.model.d_model", "rate": "model.optimizer.init_args.lr", **keys}
    for width in WIDTHS:
        for rate in RATES.tolist():
            settings = {names["width"]: width, names["rate"]: rate}
            flops = {"products": 6.0 * width**2}
            yield RunRecord(
                parameters={}, flops_per_token=flops, tokens=100, loss=loss(width, rate, drift=drift),
                hyper_parameters=settings,
            )  # fmt: skip


@pytest.mark.parametrize("drift", [0.0, -0.5, -1.0])
def test_the_power_of_the_width_comes_back(drift):
    fit = transfer_of(list(runs(drift)))
    assert fit.drift.value == pytest.approx(drift, abs=1e-6)
    assert [curve.best for curve in fit.curves] == pytest.approx([0.012 * (w / 32) ** drift for w in WIDTHS], rel=1e-6)
    assert not fit.at_edge
    kept = loss(128, 0.012 * 0.5**drift, drift=drift) - loss(128, 0.012 * 4**drift, drift=drift)
    assert fit.kept == pytest.approx(kept, abs=0.02)  # between the learning rates that were trained the loss is a line


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random, inside = np.random.default_rng(0), 0
    width, rate = (column.ravel() for column in np.meshgrid(WIDTHS, RATES, indexing="ij"))
    for _ in range(200):
        noisy = loss(width, rate, drift=-0.5) + 0.005 * random.standard_normal(len(width))
        inside += -0.5 in fit_transfer(width, rate, noisy).drift
    assert 180 <= inside <= 196


def test_repeated_runs_are_averaged_and_their_order_does_not_matter():
    width, rate = (column.ravel() for column in np.meshgrid(WIDTHS, RATES, indexing="ij"))
    clean = loss(width, rate, drift=-1.0)
    twice = [np.concatenate([column, column])[::-1] for column in (width, rate)]
    fit = fit_transfer(*twice, np.concatenate([clean + 0.3, clean - 0.3])[::-1])
    assert fit.drift.value == pytest.approx(-1.0, abs=1e-6)
    assert len(fit.curves[0].rates) == len(RATES)


def test_a_minimum_at_the_end_of_the_rates_is_told():
    width, rate = (column.ravel() for column in np.meshgrid(WIDTHS, RATES, indexing="ij"))
    fit = fit_transfer(width, rate, loss(width, rate, drift=-1.0, best=0.008))
    assert fit.at_edge == (128.0,)
    assert fit.curves[-1].best == 0.002


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"width": "model.width"}, "0 hyper-parameters of these runs are called 'd_model'"),
        ({"width": "model.lr"}, "0 hyper-parameters of these runs are called 'd_model'"),
    ],
)
def test_names_that_are_not_found_are_listed(changes, match):
    records = list(runs(0.0, **changes))
    with pytest.raises(DataError, match=match):
        transfer_of(records)
    keys = {"width_key": changes["width"], "rate_key": "model.optimizer.init_args.lr"}
    assert transfer_of(records, **keys).drift.value == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="No run has both nothing and"):
        transfer_of(records, **keys | {"width_key": "nothing"})


def test_too_few_runs_are_refused():
    with pytest.raises(DataError, match="needs at least 3"):
        fit_transfer([1, 1, 2, 2], [1, 2, 1, 2], [3, 3, 3, 3])
    with pytest.raises(DataError, match="train at least 3"):
        fit_transfer([1, 1, 1], [1, 2, 3], [3, 2, 3])
    with pytest.raises(DataError, match="runs of a sweep"):
        transfer_of([])


def test_the_verb_prints_tables_and_draws(tmp_path, capsys):
    for name, drift in (("standard", -1.0), ("mup", 0.0)):
        RunLedger(tmp_path / f"{name}.jsonl").add_all(runs(drift))
    words = [str(tmp_path / f"{name}.jsonl") for name in ("standard", "mup")]
    assert main(["scaling", "transfer", *words, "--plot", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "standard: best learning rate ~ width^-1.00" in printed
    assert "mup: best learning rate ~ width^" in printed
    assert f"{2 + 4 / 16**0.3:.4f}" in printed
    assert (tmp_path / "report" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert main(["scaling", "transfer", str(tmp_path / "none.jsonl")]) == 1
    assert "There is no ledger at" in capsys.readouterr().err


def test_the_picture_has_a_panel_for_each_parametrisation_and_stars_at_the_minima():
    fits = {"standard": transfer_of(list(runs(-1.0))), "muP": transfer_of(list(runs(0.0)))}
    figure = transfer_figure(fits)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["standard", "muP", "Where the minima go"]
    stars = [line.get_xydata()[0] for line in figure.axes[2].lines if line.get_marker() == "*"]
    assert [tuple(star) for star in stars[:4]] == [
        (width, pytest.approx(0.012 * 32 / width, rel=1e-6)) for width in WIDTHS
    ]
    for fit, axes in zip(fits.values(), figure.axes, strict=False):  # minima of the parabolas
        stars = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "*"]
        assert stars == pytest.approx([2 + 4 / width**0.3 for width in WIDTHS], abs=1e-9)
        assert stars == [curve.loss_at(curve.best) for curve in fit.curves]
    labels = " ".join(text.get_text() for text in figure.axes[2].texts)
    assert "standard:\nwidth$^{-1.00}$" in labels


def test_the_picture_of_the_critical_batch_size_says_it_and_its_interval(tmp_path):
    """McCandlish et al. 2018, arXiv:1812.06162, section 2.3: ``(S / S_min - 1) (E / E_min - 1) = 1``."""
    sizes = np.array([8, 16, 32, 64, 128, 256, 512.0])
    steps = 1000 * (1 + 90 / sizes) * np.exp(0.03 * np.random.default_rng(1).standard_normal(7))
    figure = critical_batch_figure(sizes, steps, fit_critical_batch(sizes, steps))
    write_figures(tmp_path, {"batch": figure})
    (axes,) = figure.axes
    lines = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 100]
    assert (lines[0] - 1) * (lines[1] - 1) == pytest.approx(np.ones(100))
    assert {"steps", "examples"} < {text.get_text() for text in axes.texts}
    assert any("critical: 8" in text.get_text() or "critical: 9" in text.get_text() for text in axes.texts)
