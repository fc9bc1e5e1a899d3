"""Settings beside each other: means, paired differences and their intervals, the table and the figure."""

import math
import statistics

import pytest

from lightning_lm.cli import main
from lightning_lm.errors import DataError
from lightning_lm.scaling import RunLedger, RunRecord, compare_settings

LOSSES = {"raw": (2.0, 2.2, 2.1), "clean": (1.5, 1.8, 1.65)}
T_95 = 4.302652729911275  # Student's 0.975 quantile for two degrees of freedom


def runs(**more) -> list[RunRecord]:
    return [
        RunRecord(
            parameters={"total": 10.0},
            flops_per_token={"products": 60.0},
            tokens=100,
            loss=loss,
            hyper_parameters={"data.train": value, "seed_everything": seed, **more},
        )
        for seed in range(3)
        for value, losses in LOSSES.items()
        for loss in losses[seed : seed + 1]
    ]


def test_means_and_paired_differences_have_students_intervals():
    raw, clean = compare_settings(runs(**{"trainer.max_steps": 5}))
    assert (raw.value, clean.value, raw.change) == ("raw", "clean", None)
    assert sorted(clean.losses.values()) == sorted(LOSSES["clean"])
    differences = [after - before for before, after in zip(*LOSSES.values(), strict=True)]
    for found, values in ((clean.mean, LOSSES["clean"]), (clean.change, differences)):
        half = T_95 * statistics.stdev(values) / math.sqrt(3)
        mean = statistics.mean(values)
        assert found == pytest.approx((mean, mean - half, mean + half), abs=1e-3 * half)


def test_one_run_has_no_interval_and_unpaired_seeds_no_difference():
    some = runs()
    raw, clean = compare_settings([some[0], some[3]])
    assert raw.mean.value == 2.0
    assert math.isnan(raw.mean.low)
    assert math.isnan(clean.change.value)


def test_the_setting_is_the_one_that_varies_or_is_named():
    both = [*runs(lr=1), *runs(lr=2)]
    with pytest.raises(DataError, match=r"2 settings vary.*--setting: data.train, lr"):
        compare_settings(both)
    assert [len(one.losses) for one in compare_settings(both, "lr")] == [6, 6]
    with pytest.raises(DataError, match="No run has the setting 'rate'"):
        compare_settings(both, "rate")
    with pytest.raises(DataError, match="none varies"):
        compare_settings([])


def test_the_verb_prints_a_table_and_draws_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    RunLedger(tmp_path / "l.jsonl").add_all(runs())
    assert main(["scaling", "compare", "l.jsonl", "--plot", "report"]) == 0
    printed = capsys.readouterr().out
    assert "clean" in printed
    assert "-0.4500" in printed
    assert f"{1.65 / math.log(2):.4f}" in printed
    assert (tmp_path / "report" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "comparison.png" in (tmp_path / "report" / "report.md").read_text()
