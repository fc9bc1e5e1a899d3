"""Accuracy on tasks from compute: known laws are recovered, held-out runs are met, what cannot be known is refused."""

import numpy as np
import pytest

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.scaling import (
    RunLedger,
    RunRecord,
    TaskRuns,
    fit_accuracy,
    fit_cost,
    hold_out_scores,
    task_runs_of,
    tasks_in,
)
from lightning_lm.scaling.plots.tasks import task_figure

E, K, G, MIDDLE, WIDTH, CHANCE = 0.4, 1.2, 0.15, 1.1, 0.12, 0.25


def cost_law(flops):
    return E + K * (flops / 1e18) ** -G


def accuracy_law(cost, *, chance=CHANCE, ceiling=1.0):
    return chance + (ceiling - chance) / (1 + np.exp((cost - MIDDLE) / WIDTH))


def runs_of(number=8, *, noise=0.0, seed=None, low=1e17, high=1e20, chance=CHANCE, items=1000, ceiling=1.0):
    flops = np.geomspace(low, high, number)
    where = np.random.default_rng(seed)
    cost = cost_law(flops) * np.exp(noise * where.standard_normal(number))
    accuracy = accuracy_law(cost, chance=chance, ceiling=ceiling)
    accuracy = accuracy if seed is None else where.binomial(items, accuracy) / items
    return TaskRuns(
        flops=flops,
        cost=cost,
        accuracy=accuracy,
        num_items=np.full(number, float(items)),
        chance=chance,
        ceiling=ceiling,
    )


@pytest.mark.parametrize(("chance", "ceiling"), [(CHANCE, 1.0), (0.0, 1.0), (0.1, 0.8)])
def test_both_laws_are_recovered(chance, ceiling):
    runs = runs_of(chance=chance, ceiling=ceiling)
    cost, accuracy = fit_cost(runs, num_bootstraps=20), fit_accuracy(runs, num_bootstraps=20)
    found = {name: one.value for name, one in {**cost.values, **accuracy.values}.items()}
    expected = {"E": E, "K": K * 1e18**G, "g": G, "cost_0": MIDDLE, "width": WIDTH}
    assert found == pytest.approx(expected, rel=1e-5)
    at = 1e22
    assert cost.predict(at).value == pytest.approx(cost_law(at), rel=1e-6)
    wanted = accuracy_law(cost_law(at), chance=chance, ceiling=ceiling)
    assert accuracy.from_compute(cost, at).value == pytest.approx(wanted, rel=1e-6)
    assert cost.findings == accuracy.findings == ()


def test_the_second_stage_is_weighted_least_squares():
    from scipy.optimize import least_squares

    runs = runs_of(noise=0.01, seed=4)
    found = {name: one.value for name, one in fit_accuracy(runs, num_bootstraps=0).values.items()}
    p = (runs.accuracy * 1000 + 0.5) / 1001
    errors = np.sqrt(p * (1 - p) / 1000)
    residuals = lambda at: (CHANCE + (1 - CHANCE) / (1 + np.exp((runs.cost - at[0]) / at[1])) - runs.accuracy) / errors  # noqa: E731
    best = least_squares(residuals, [1.0, 0.2], xtol=1e-14).x
    assert (found["cost_0"], found["width"]) == pytest.approx(tuple(best), rel=1e-5)


def test_held_out_runs_lie_in_their_intervals_about_as_often_as_they_should():
    inside = np.zeros(3)
    for seed in range(16):
        (held,) = hold_out_scores(runs_of(noise=0.01, seed=seed), 1, num_bootstraps=80)
        inside += (held.cost in held.predicted_cost, held.accuracy in held.predicted, held.accuracy in held.from_cost)
        assert held.error == held.predicted.value - held.accuracy
    assert (inside >= 13).all(), inside
    rest = runs_of(noise=0.01, seed=3)
    few = rest.where(np.arange(4, 8))
    wide, narrow = (fit_cost(some, num_bootstraps=200).predict(1e22) for some in (few, rest))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low), "few runs say less"


def test_what_is_not_seen_in_accuracy_is_seen_in_the_cost():
    small = runs_of(6, high=1e18, seed=1, noise=0.003)
    with pytest.raises(DataError, match=r"within 2 standard errors of chance \(0.25\)"):
        fit_accuracy(small)
    estimate = fit_cost(small, num_bootstraps=300).predict(1e19)
    assert cost_law(1e19) in estimate
    (held,) = hold_out_scores(small, 1, num_bootstraps=50)
    assert (held.predicted, held.error) == (None, None)
    assert held.cost in held.predicted_cost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: runs.where(np.arange(2)), r"2 run\(s\) of 2 budget\(s\) cannot fix"),
        (lambda runs: runs.where(np.arange(3)), r"give at least 4 runs of 3 budgets"),
        (lambda runs: runs.where([0, 0, 1, 1, 1]), r"5 run\(s\) of 2 budget\(s\)"),
    ],
)
def test_too_few_runs_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        fit_cost(change(runs_of()))


def altered(**columns):
    runs = runs_of()
    known = {name: getattr(runs, name) for name in ("flops", "cost", "accuracy", "num_items", "chance")}
    return TaskRuns(**{**known, **columns})


def test_runs_that_follow_no_law_are_refused_and_bends_are_named():
    runs = runs_of()
    with pytest.raises(DataError, match="does not fall with compute"):
        fit_cost(altered(cost=runs.cost[::-1].copy()))
    with pytest.raises(DataError, match="Accuracy falls as the right answers become cheaper"):
        fit_accuracy(altered(accuracy=runs.accuracy[::-1].copy()))
    with pytest.raises(DataError, match=r"1 of 8 runs are above chance \(0.25\) and 1 of these below the ceiling"):
        fit_accuracy(altered(accuracy=np.array([CHANCE] * 7 + [0.5])))
    with pytest.raises(DataError, match=r"2 of 8 runs are above chance.* and 0 of these"):
        fit_accuracy(altered(accuracy=np.array([CHANCE] * 6 + [1.0] * 2)))
    with pytest.raises(DataError, match="at the ceiling"):
        fit_accuracy(altered(accuracy=np.full(8, 1.0)))
    bent = runs.cost.copy()
    bent[3] *= 1.5
    (finding,) = fit_cost(altered(cost=bent), num_bootstraps=0).findings
    assert "not monotone: 4 costs more than the smaller 3" in finding
    dented = runs.accuracy.copy()
    dented[6] -= 0.3
    (finding,) = fit_accuracy(altered(accuracy=dented), num_bootstraps=0).findings
    assert "7 is less accurate than the costlier 6" in finding


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"chance": 1.0}, "chance=1 must be at least 0 and below"),
        ({"accuracy": np.full(8, 1.2)}, "accuracy of run 1 is 1.2"),
        ({"cost": np.full(8, -1.0)}, "cost of run 1 is -1.0"),
        ({"num_items": np.zeros(8)}, "num_items of run 1"),
        ({"flops": np.ones(3)}, "one value for each run"),
    ],
)
def test_impossible_columns_are_refused(columns, message):
    with pytest.raises(DataError, match=message):
        altered(**columns)


def record(number, scores, **more):
    task = {"metric": "acc", "chance": 0.25, "num_items": 500, "scores": scores, "errors": {}}
    settings = {"parameters": {"products": 1e6}, "flops_per_token": {"products": 6e6}, "tokens": 1000 * 4**number}
    return RunRecord(**{**settings, "loss": 3.0, "name": f"r{number}", "tasks": {"quiz": task}, **more})


def test_scores_go_into_the_ledger_with_the_run_or_after_it(tmp_path):
    ledger = RunLedger(tmp_path / "ledger.jsonl")
    first, second = record(0, {"acc": 0.3, "gold_bits_per_byte": 2.0}), record(1, {"acc": 0.5}, tasks={})
    ledger.add_all([first, second])
    summary = {"metric": "acc", "chance": 0.25, "num_items": 500, "scores": {"acc": 0.4, "gold_bits_per_byte": 1.5}}
    for accuracy in (0.1, 0.4):
        ledger.add_scores(second.id, {"quiz": {**summary, "scores": {**summary["scores"], "acc": accuracy}}})
    read, bad = ledger.scan()
    assert not bad
    assert [run.tasks["quiz"]["scores"]["acc"] for run in read] == [0.3, 0.4]
    assert [run.id for run in read] == [first.id, second.id]
    assert tasks_in(read) == {"quiz": 2}
    with pytest.raises(DataError, match="no run with the id 'f00'"):
        ledger.add_scores("f00", {})
    text = ledger.path.read_text()
    ledger.path.write_text(text.replace('"acc": 0.4', '"acc": 0.9'))
    assert "its content has changed" in ledger.bad_lines()[0].reason


def test_columns_of_a_ledger():
    runs = [record(n, {"acc": 0.2 + 0.1 * n, "gold_logprob": -3.0 + n}) for n in range(3)]
    found = task_runs_of(runs, "quiz")
    assert found.flops.tolist() == [6e9 * 4**n for n in range(3)]
    assert found.cost.tolist() == [3, 2, 1]
    assert (found.chance, found.metric, found.cost_name, found.names) == (
        0.25,
        "acc",
        "gold_logprob",
        ("r0", "r1", "r2"),
    )
    assert task_runs_of(runs, "quiz", cost="loss").cost.tolist() == [3, 3, 3]
    with pytest.raises(
        ConfigurationError, match=r"No finished run has scores.*quiz \(3 runs\).*ScalingLaw and Evaluate"
    ):
        task_runs_of(runs, "riddles")
    with pytest.raises(ConfigurationError, match=r"r0 has no 'acc_norm' of quiz; it has acc, gold_logprob"):
        task_runs_of(runs, "quiz", metric="acc_norm")
    other = {"quiz": {**runs[0].tasks["quiz"], "chance": 0.5}}
    with pytest.raises(DataError, match="different levels of chance"):
        task_runs_of([*runs, record(4, {}, tasks=other)], "quiz")


def test_of_each_budget_the_best_size_counts_and_its_repetitions():
    def scored(size, tokens, cost, name):
        return record(
            0,
            {"acc": 0.5, "gold_bits_per_byte": cost},
            flops_per_token={"products": 6 * size},
            tokens=tokens,
            name=name,
        )

    runs = [
        scored(100, 1000, 2.0, "best"), scored(100, 1001, 2.4, "again"), scored(50, 2000, 2.25, "small"),
        scored(200, 4000, 1.5, "next"), scored(400, 2000, 1.4, "wide"),
    ]  # fmt: skip
    assert task_runs_of(runs, "quiz").names == ("best", "again", "wide")
    assert len(task_runs_of(runs, "quiz", all_sizes=True)) == 5


def test_the_figure_has_accuracy_and_cost_side_by_side():
    runs = runs_of(noise=0.01, seed=2)
    cost, accuracy = fit_cost(runs, num_bootstraps=20), fit_accuracy(runs, num_bootstraps=20)
    held = hold_out_scores(runs, 1, num_bootstraps=20)
    figure = task_figure(runs, "quiz", cost=cost, accuracy=accuracy, held_out=held, budgets=[1e21])
    left, middle, right = figure.axes
    for axes, values in ((left, runs.accuracy), (middle, runs.cost)):
        points = next(line for line in axes.lines if line.get_marker() == "o")
        assert points.get_xydata() == pytest.approx(np.column_stack([runs.flops, values]))
        stars = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "*"]
        assert stars == [runs.flops[-1], 1e21]
    assert "chance" in [text.get_text() for text in left.texts]
    assert right.xaxis_inverted()
    bare = task_figure(runs, "quiz")
    assert not any(line.get_marker() == "*" for axes in bare.axes for line in axes.lines)
