"""The verb ``lightning-lm scaling``: fit a ledger, predict, draw; plan the next run; take in other people's runs."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lm.cli import scaling_tasks
from lightning_lm.cli.numbers import POSITIVE, UP_TO_ONE, WHOLE
from lightning_lm.errors import DataError, LightningLMError
from lightning_lm.scaling.report import Report, interval, new_table, number, significant

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_lm.scaling import HeldOut, Optimum, Points, RunRecord, ScalingFit

__all__ = ["add_arguments", "run"]

_METHODS = ("general", "parametric", "isoflop", "kaplan", "data-constrained")
_BOOTSTRAPS_OF_A_COMPARISON = 200
_ENOUGH_HELD_OUT = 3
"""Runs by which methods can be told apart; a single one is met by luck."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``lightning-lm scaling`` takes.

    Args:
        parser: The parser of the verb.
    """
    verbs = parser.add_subparsers(dest="scaling_verb", required=True, metavar="VERB")
    fit = verbs.add_parser("fit", help="fit the runs of a ledger, with intervals, a hold-out test and figures")
    fit.add_argument("ledger", type=Path, metavar="LEDGER", help="what ScalingLaw or `sweep` wrote")
    fit.add_argument(
        "--method", choices=_METHODS, default=_METHODS[0],
        help="default: %(default)s",
    )  # fmt: skip
    fit.add_argument(
        "--predict-flops", type=POSITIVE, nargs="+", default=[], metavar="FLOPS", help="budgets to predict"
    )
    fit.add_argument(
        "--up-to", type=POSITIVE, metavar="FLOPS", help="leave larger runs out, to judge a method without them"
    )
    fit.add_argument("--hold-out", type=WHOLE, default=1, metavar="N", help="largest budgets that test it (default: 1)")
    fit.add_argument("--plot", type=Path, metavar="FOLDER", help="write figures and report.md there")
    _add_shared(fit)
    plan = verbs.add_parser("plan", help="which size and how many tokens to train with a budget")
    plan.add_argument("--budget", type=POSITIVE, required=True, metavar="FLOPS", help="of training, for example 1e19")
    plan.add_argument("--ledger", type=Path, metavar="PATH", help="your runs; default: the law of Hoffmann et al. 2022")
    plan.add_argument("--peak-flops", type=POSITIVE, metavar="FLOP/S", help="of all devices, to say how long it takes")
    plan.add_argument(
        "--mfu", type=UP_TO_ONE, default=0.4, help="share of the peak that is reached (default: %(default)s)"
    )
    plan.add_argument("--served-tokens", type=POSITIVE, metavar="N", help="tokens of inference in the model's life")
    _add_shared(plan)
    moved = verbs.add_parser("transfer", help="how the best learning rate of a sweep moves with the width")
    moved.add_argument("ledgers", type=Path, nargs="+", metavar="LEDGER", help="one for each parametrisation")
    moved.add_argument("--width", metavar="NAME", help="hyper-parameter (default: the one that ends in d_model)")
    moved.add_argument("--rate", metavar="NAME", help="hyper-parameter (default: the one that ends in lr)")
    moved.add_argument("--plot", type=Path, metavar="FOLDER", help="write a figure and report.md there")
    compared = verbs.add_parser("compare", help="the loss of each value of one setting, over seeds")
    compared.add_argument("ledger", type=Path, metavar="LEDGER", help="of a sweep with a grid: of values and of seeds")
    compared.add_argument("--setting", metavar="NAME", help="hyper-parameter (default: the one that varies)")
    compared.add_argument("--plot", type=Path, metavar="FOLDER", help="write a figure and report.md there")
    scaling_tasks.add_arguments(verbs)
    _add_shared(verbs.choices["tasks"])
    taken = verbs.add_parser("import", help="add runs of a .csv, .json or .jsonl table to a ledger")
    taken.add_argument("table", type=Path, metavar="TABLE", help="with loss and two of parameters, tokens and flops")
    taken.add_argument("--ledger", type=Path, required=True, metavar="PATH", help="made where it does not exist")
    taken.add_argument("--convention", default="total", help="how its parameters are counted (default: %(default)s)")


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--convention", default="products", help="how sizes are counted (default: %(default)s)")
    parser.add_argument(
        "--bootstraps", type=WHOLE, default=1000, metavar="N", help="for intervals (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Carry out the verb and return the exit status; what a user can mend is said in one line on stderr.

    Args:
        arguments: Parsed arguments of `add_arguments`.
    """
    try:
        if arguments.scaling_verb in ("tasks", "score"):
            scored = {"tasks": scaling_tasks.predict_tasks, "score": scaling_tasks.add_score}
            scored[arguments.scaling_verb](arguments, _records(arguments.ledger))
        else:
            verbs = {"fit": _fit, "plan": _plan, "transfer": _transfer, "compare": _compare, "import": _import}
            verbs[arguments.scaling_verb](arguments)
    except (LightningLMError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        sys.stderr.write(f"lightning-lm scaling: {error}\n")
        return 1
    return 0


def _fit(arguments: argparse.Namespace) -> None:
    from lightning_lm.scaling import curves_of

    report = Report(f"Scaling law of {arguments.ledger}")
    records, points = _points(arguments.ledger, arguments.convention)
    if arguments.up_to is not None:
        points = points.where(points.flops <= arguments.up_to)
    fit = _fitted(points, arguments)
    report.table(_parameter_table(fit, points, arguments.convention))
    for finding in fit.findings:
        report.say(f"Note ({finding.kind}): {finding.message}")
    held = _held_out(points, arguments, report) if arguments.hold_out else []
    if held:
        _compare_forms(points, arguments, report)
    predicted = [fit.optimal(flops) for flops in arguments.predict_flops]
    if predicted:
        report.table(_optimum_table(predicted, points))
    if arguments.plot is not None:
        from lightning_lm.scaling.plots.fits import figures, write_figures

        curves = curves_of(records, arguments.convention)
        drawn = figures(points, fit, curves, held_out=held, predicted=predicted)
        written = write_figures(arguments.plot, drawn)
        path = report.write(arguments.plot, arguments.command_line, written)
        print(f"Report: {path}, with {', '.join(figure.name for figure in written)}")


def _plan(arguments: argparse.Namespace) -> None:
    from lightning_lm.scaling import check_convention, optimal_with_inference

    check_convention(arguments.convention)
    fit = _fitted(_points(arguments.ledger, arguments.convention)[1], arguments) if arguments.ledger else _published()
    best = fit.optimal(arguments.budget)
    Report("").table(_optimum_table([best], fit.points if arguments.ledger else None))
    if not arguments.ledger:
        print(
            "By the constants of Hoffmann et al. 2022, equation 10, for their data and tokenizer; for yours: --ledger."
        )
    if arguments.peak_flops:
        seconds = arguments.budget / (arguments.peak_flops * arguments.mfu)
        print(f"At {arguments.mfu:.0%} of {arguments.peak_flops:.3g} FLOP/s that takes {_duration(seconds)}.")
    if arguments.served_tokens:
        served = optimal_with_inference(fit, best.loss.value, arguments.served_tokens)
        print(
            f"With {arguments.served_tokens:.3g} tokens to serve, the same loss is cheapest with "
            f"{number(served.parameters)} parameters on {number(served.tokens)} tokens: {served.saved:.0%} saved."
        )


def _transfer(arguments: argparse.Namespace) -> None:
    from lightning_lm.scaling import transfer_of

    stems = [path.stem for path in arguments.ledgers]
    fits = {
        path.stem if stems.count(path.stem) == 1 else str(path): transfer_of(
            _records(path), width_key=arguments.width, rate_key=arguments.rate
        )
        for path in arguments.ledgers
    }
    report = Report("Learning-rate transfer")
    for name, fit in fits.items():
        title = f"{name}: best learning rate ~ width^{fit.drift.value:+.2f}"
        table = new_table(title, "width", "best", "loss", "rates")
        table.caption = (
            f"95 % interval of the power {interval(fit.drift)}. At width {fit.curves[-1].width:g} the best rate of "
            f"width {fit.curves[0].width:g} costs {significant(fit.kept)}."
        )
        for curve in fit.curves:
            best = f"{significant(curve.best)}{' (edge)' if curve.at_edge else ''}"
            table.add_row(f"{curve.width:g}", best, f"{float(curve.loss_at(curve.best)):.4f}", str(len(curve.rates)))
        report.table(table)
        if fit.at_edge:
            report.say(
                f"Note (edge): {name} may have better rates beyond those tried at {', '.join(map(str, fit.at_edge))}."
            )
    if arguments.plot is not None:
        from lightning_lm.scaling.plots.fits import write_figures
        from lightning_lm.scaling.plots.transfer import transfer_figure

        written = write_figures(arguments.plot, {"transfer": transfer_figure(fits)})
        path = report.write(arguments.plot, arguments.command_line, written)
        print(f"Report: {path}, with {written[0].name}")


def _compare(arguments: argparse.Namespace) -> None:
    from lightning_lm.scaling import compare_settings

    results = compare_settings(_records(arguments.ledger), arguments.setting)
    report = Report(f"Settings of {arguments.ledger} beside each other")
    table = new_table("Loss of each setting", "setting", "runs", "loss", "bits", "95 % interval", "change", "of change")
    table.caption = (
        "Nats and bits per token; a token is a byte with the tokenizer Bytes. Changes are to the first row, of\n"
    )
    table.caption += "runs with the same seed."
    for one in results:
        change = ("", "") if one.change is None else (f"{one.change.value:+.4f}", interval(one.change))
        bits = significant(one.mean.value / math.log(2))
        table.add_row(one.value, str(len(one.losses)), significant(one.mean.value), bits, interval(one.mean), *change)
    report.table(table)
    if arguments.plot is not None:
        from lightning_lm.scaling.plots.comparison import comparison_figure
        from lightning_lm.scaling.plots.fits import write_figures

        written = write_figures(arguments.plot, {"comparison": comparison_figure(results)})
        print(f"Report: {report.write(arguments.plot, arguments.command_line, written)}, with {written[0].name}")


def _import(arguments: argparse.Namespace) -> None:
    from lightning_lm.scaling import RunLedger, import_runs

    runs = import_runs(arguments.table, convention=arguments.convention)
    RunLedger(arguments.ledger).add_all(runs)
    print(f"{len(runs)} runs added to {arguments.ledger}, counted as {arguments.convention!r}.")
    print(f"What to type next:\n  lightning-lm scaling fit {arguments.ledger} --convention {arguments.convention}")


def _points(path: Path, convention: str) -> tuple[list["RunRecord"], "Points"]:
    from lightning_lm.scaling import points_of

    records = _records(path)
    return records, points_of(records, convention)


def _records(path: Path) -> list["RunRecord"]:
    from lightning_lm.scaling import RunLedger

    if not path.is_file():
        raise DataError(f"There is no ledger at {path}. `lightning-lm sweep --ledger {path} ...` makes one.")
    records, bad_lines = RunLedger(path).scan()
    for bad in bad_lines:
        sys.stderr.write(f"{path}, line {bad.number} is passed over: {bad.reason}.\n")
    return records


def _fitted(points: "Points", arguments: argparse.Namespace) -> "ScalingFit":
    return _methods(arguments.bootstraps)[getattr(arguments, "method", _METHODS[0])](points)


def _methods(num_bootstraps: int) -> dict[str, Callable[["Points"], "ScalingFit"]]:
    from lightning_lm.scaling import (
        Estimator,
        IsoFlop,
        fit_data_constrained,
        fit_general,
        fit_isoflop,
        fit_kaplan,
        fit_parametric,
    )

    estimator, parabolas = Estimator(num_bootstraps=num_bootstraps), IsoFlop(num_bootstraps=num_bootstraps)
    return {
        "parametric": lambda points: fit_parametric(points, estimator),
        "general": lambda points: fit_general(points, Estimator(num_bootstraps=num_bootstraps, delta=1e-2)),
        "isoflop": lambda points: fit_isoflop(points, parabolas),
        "kaplan": lambda points: fit_kaplan(points, estimator),
        "data-constrained": lambda points: fit_data_constrained(points, estimator),
    }


def _published() -> "ScalingFit":
    """Return the law of Hoffmann et al. 2022, arXiv:2203.15556, equation 10, without intervals."""
    import numpy as np

    from lightning_lm.scaling import ChinchillaLaw, Points, ScalingFit

    return ScalingFit(
        law=ChinchillaLaw(),
        theta=np.array([np.log(1.69), np.log(406.4), 0.34, np.log(410.7), 0.28]),
        samples=np.empty((0, 5)),
        points=Points.of([1.0], [1.0], [1.0]),
        residuals=np.zeros(1),
    )


def _parameter_table(fit: "ScalingFit", points: "Points", convention: str) -> "Table":
    from lightning_lm.scaling import CONVENTIONS

    span = f"{points.flops.min():.3g} to {points.flops.max():.3g} FLOPs"
    title = f"{fit.method}, {type(fit.law).__name__}: {len(fit.points)} runs, {span}"
    table = new_table(title, "parameter", "value", "95 % interval")
    table.caption = f"Sizes counted as {convention!r}: {CONVENTIONS[convention]}."
    for name, estimate in fit.intervals().items():
        table.add_row(name, significant(estimate.value), interval(estimate))
    for name, estimate in zip(("N ~ C^a: a", "D ~ C^b: b"), fit.exponents, strict=True):
        table.add_row(name, significant(estimate.value), interval(estimate))
    return table


def _held_out(points: "Points", arguments: argparse.Namespace, report: Report) -> list["HeldOut"]:
    from lightning_lm.scaling import hold_out

    try:
        held = hold_out(points, lambda some: _fitted(some, arguments), num_budgets=arguments.hold_out)
    except DataError as error:
        report.say(f"No hold-out test: {error}")
        return []
    table = new_table(
        "Held out: fitted without these, then asked for them",
        "FLOPs", "parameters", "tokens", "loss", "predicted", "95 % of runs", "error",
    )  # fmt: skip
    for one in held:
        inside = "" if one.loss in one.predicted else "\n(outside)"
        table.add_row(
            f"{one.flops:.3g}", f"{one.parameters:.3g}", f"{one.tokens:.3g}", f"{one.loss:.4f}",
            f"{one.predicted.value:.4f}", interval(one.predicted) + inside, f"{one.error:+.2%}",
        )  # fmt: skip
    report.table(table)
    return held


def _compare_forms(points: "Points", arguments: argparse.Namespace, report: Report) -> None:
    from lightning_lm.scaling import compare_forms

    number = min(arguments.bootstraps, _BOOTSTRAPS_OF_A_COMPARISON)
    tests = compare_forms(points, _methods(number), num_budgets=arguments.hold_out)
    if len(tests) < 2:
        return
    table = new_table("The same test for every method", "method", "RMS error", "runs in their intervals")
    for test in tests:
        table.add_row(test.method, f"{test.error:.2%}", f"{test.inside} of {len(test.held)}")
    report.table(table)
    told = len(tests[0].held) >= _ENOUGH_HELD_OUT and any(test.method == arguments.method for test in tests)
    if told and tests[0].method != arguments.method:
        report.say(f"Note (form): {tests[0].method} extrapolates better here than {arguments.method}: --method.")


def _optimum_table(optima: Sequence["Optimum"], points: "Points | None") -> "Table":
    columns = ("FLOPs", "parameters", "tokens", "tokens per parameter", "loss")
    table = new_table("How to spend a budget, with 95 % intervals" if points else "How to spend a budget", *columns)
    for best in optima:
        estimates = (best.parameters, best.tokens, best.tokens_per_parameter, best.loss)
        table.add_row(f"{best.flops:.3g}", *map(number, estimates))
        if points is not None:
            table.add_row("from", *(significant(estimate.low) for estimate in estimates))
            table.add_row("to", *(significant(estimate.high) for estimate in estimates), end_section=True)
    if points is None:
        return table
    table.caption = "Intervals of the law; single runs scatter around it as the residuals do."
    if (far := max(best.flops for best in optima) / points.flops.max()) > 100:
        table.caption += f"\nBeware: {far:.0e} times the largest budget that was measured."
    return table


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
