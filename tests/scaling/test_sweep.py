"""Budgets that hold, sweeps that go on where they stopped, and the settings they try."""

import pytest

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.scaling import (
    Budget,
    ClockMeter,
    FlopMeter,
    Grid,
    IsoFlopPlan,
    RandomSearch,
    RunLedger,
    RunRecord,
    Sweep,
    Trial,
)


def record_of(trial, **more):
    settings = {
        "parameters": {"total": 1.0},
        "flops_per_token": {"products": trial.flops / 10},
        "tokens": 10,
        "loss": 2.0,
    }
    return RunRecord(**{**settings, "hyper_parameters": trial.settings, **more})


def trials(*flops):
    return [Trial(settings={"width": number}, flops=amount) for number, amount in enumerate(flops)]


def test_a_budget_reserves_the_most_and_charges_what_was_used():
    budget = Budget(100.0, FlopMeter(margin=0.5))
    first, second, third = trials(40.0, 20.0, 30.0)
    budget.reserve(first)
    assert budget.left == 40
    budget.reserve(second)
    assert budget.left == 10
    with pytest.raises(ConfigurationError, match=r"may take 45 FLOPs and 10 of 100 FLOPs are left"):
        budget.reserve(third)
    assert budget.charge(first, record_of(first)) == 40
    assert (budget.left, budget.spent) == (30, 40)
    budget.release(second)
    budget.reserve(third)
    with pytest.raises(ConfigurationError, match="asked for before"):
        budget.reserve(first)


def test_a_budget_in_seconds_and_one_that_is_resumed():
    meter = ClockMeter(flops_per_s=10.0)
    (trial,) = trials(100.0)
    budget = Budget(60.0, meter, spent_by=[record_of(trial, wall_time_s=45.0), record_of(trial)])
    assert budget.left == 15
    budget.reserve(trial)
    assert budget.left == 5
    assert budget.charge(trial, record_of(trial, wall_time_s=12.0)) == 12
    with pytest.raises(ConfigurationError, match="allows no run"):
        Budget(0.0, meter)


@pytest.fixture
def ledger(tmp_path):
    return RunLedger(tmp_path / "ledger.jsonl")


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_sweep_that_was_interrupted_trains_only_the_rest(ledger, jobs):
    made = []

    def train(trial):
        if trial.settings["width"] == 2 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(trial.settings["width"])
        ledger.add(record_of(trial))

    def sweep(jobs):
        return Sweep(trials(1.0, 2.0, 3.0, 4.0), train, ledger=ledger, budget=Budget(1e3, FlopMeter()), jobs=jobs)

    with pytest.raises(KeyboardInterrupt):
        list(sweep(1).run())
    made.append("interrupted")
    outcomes = list(sweep(jobs).run())
    assert made[:3] == [0, 1, "interrupted"]
    assert sorted(made[3:]) == [2, 3]
    assert [outcome.status for outcome in outcomes] == ["found", "found", "trained", "trained"]
    assert [outcome.record.hyper_parameters["width"] for outcome in outcomes] == [0, 1, 2, 3]
    assert len(ledger) == 4


def test_what_does_not_fit_is_refused_and_what_fails_is_told(ledger):
    def train(trial):
        if trial.settings["width"] == 0:
            raise DataError("no text")
        if trial.settings["width"] != 3:
            ledger.add(record_of(trial))

    runs = trials(50.0, 60.0, 50.0, 30.0, 35.0)
    outcomes = list(Sweep(runs, train, ledger=ledger, budget=Budget(100.0, FlopMeter(margin=0))).run())
    assert [outcome.status for outcome in outcomes] == ["failed", "trained", "refused", "failed", "trained"]
    assert outcomes[0].message == "no text"
    assert "40 of 100 FLOPs are left" in outcomes[2].message
    assert "left no record" in outcomes[3].message


def test_the_same_run_twice_is_refused(ledger):
    with pytest.raises(ConfigurationError, match="width=0 twice"):
        Sweep([*trials(1.0), *trials(1.0)], ledger.add, ledger=ledger, budget=Budget(9.0, FlopMeter()))


def test_grids_and_random_draws():
    assert len(Grid(values={"heads": [1, 2], "width": [64, 128, 256], "lr": [0.1]}).settings()) == 6
    search = RandomSearch(num_runs=400, ranges={"lr": (1e-4, 1e-2)}, choices={"batch_size": [8, 16]})
    drawn = search.settings()
    assert drawn == search.settings()
    rates = [one["lr"] for one in drawn]
    assert 1e-4 <= min(rates) < max(rates) <= 1e-2
    assert sum(rate < 1e-3 for rate in rates) == pytest.approx(200, abs=50)  # five standard deviations
    assert sum(one["batch_size"] == 8 for one in drawn) == pytest.approx(200, abs=50)
    with pytest.raises(ConfigurationError, match="positive and rising"):
        RandomSearch(num_runs=1, ranges={"lr": (0.0, 1.0)})


def test_sizes_follow_the_budget():
    sizes = [10.0**power for power in range(3, 10)]
    plan = IsoFlopPlan(flops=(), sizes_per_budget=3, tokens_per_parameter=20.0)
    assert plan.choose(sizes, 120 * 1e5**2) == [1, 2, 3]  # 1e5 parameters and 2e6 tokens
    assert plan.choose(sizes, 120 * 1e7**2) == [3, 4, 5]
    assert plan.choose(sizes, 120 * 1e20**2) == [4, 5, 6]
