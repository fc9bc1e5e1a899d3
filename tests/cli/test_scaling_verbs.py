"""``lightning-lm sweep`` and ``lightning-lm scaling``, as a user types them."""

import re

import numpy as np
import pytest
import yaml

from lightning_lm.cli import main, sweep_plan
from lightning_lm.scaling import RunLedger, RunRecord


def runs_of_hoffmann():
    """Hoffmann et al. 2022, arXiv:2203.15556, equation 10, around the optimum of five budgets."""
    for C in np.geomspace(1e18, 1e21, 5):
        for N in (0.09 * C**0.46) * np.geomspace(0.3, 3, 5):
            D = round(C / 6 / N)
            loss = 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28
            yield RunRecord(parameters={}, flops_per_token={"products": 6 * N}, tokens=D, loss=loss, name=f"{N:.0f}")


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    RunLedger(path).add_all(runs_of_hoffmann())
    return path


def test_fit_prints_the_law_the_test_and_the_prediction_and_draws(ledger, tmp_path, capsys):
    words = ["--predict-flops", "1e21", "1e24", "--plot", str(tmp_path / "report"), "--bootstraps", "20"]
    assert main(["scaling", "fit", str(ledger), *words]) == 0
    printed = capsys.readouterr().out
    assert "0.3400" in printed
    assert "Held out: fitted without these" in printed
    assert len(re.findall(r"[+-]0\.00%", printed)) == 5  # of the five runs of the largest budget
    assert "1e+24" in printed
    assert "Beware: 1e+03 times" in printed
    names = {"frontier.png", "residuals.png", "isoflop.png", "contours.png"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names | {"report.md"}
    report = (tmp_path / "report" / "report.md").read_text()
    assert f"`lightning-lm scaling fit {ledger} --predict-flops 1e21 1e24" in report
    for part in (
        "alpha              0.3400",
        "Held out: fitted without these",
        "1e+24",
        "Beware",
        "![isoflop](isoflop.png)",
    ):
        assert part in report
    assert all((tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_tables_fit_into_80_columns(ledger, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["scaling", "fit", str(ledger), "--predict-flops", "1e21", "1e24", "--bootstraps", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("  1e+24")]
    assert len(row.split()) == 5  # no cell is broken


def test_methods_are_compared_without_the_budget_that_will_judge_them(ledger, capsys):
    assert main(["scaling", "fit", str(ledger), "--method", "kaplan", "--up-to", "3e20", "--bootstraps", "5"]) == 0
    printed = capsys.readouterr().out
    assert "20 runs, 1e+18 to 1.78e+20 FLOPs" in printed
    ranked = re.findall(r"(parametric|general|isoflop|kaplan|data-constrained) +[\d.]+%", printed)
    assert sorted(ranked[:2]) == ["general", "parametric"]  # both hold the law of these runs
    assert sorted(ranked[2:]) == ["isoflop", "kaplan"]  # and no run says which of its tokens were new
    assert f"{ranked[0]} extrapolates better here than kaplan" in printed


@pytest.mark.parametrize("method", ["isoflop", "kaplan"])
def test_other_methods_are_a_word_away(ledger, capsys, method):
    assert main(["scaling", "fit", str(ledger), "--method", method, "--bootstraps", "5", "--hold-out", "0"]) == 0
    assert "25 runs" in capsys.readouterr().out


def test_plan_by_the_published_law(capsys):
    words = ["--budget", "5.76e23", "--peak-flops", "4e14", "--served-tokens", "1e13"]
    assert main(["scaling", "plan", *words]) == 0
    printed = capsys.readouterr().out
    assert "3.22e+10" in printed  # G (C/6)^(beta / (alpha + beta)) of the paper's rounded constants
    assert "41666.7 days" in printed
    assert "to serve" in printed


def test_a_bad_line_and_a_missing_ledger_are_named(ledger, tmp_path, capsys):
    with ledger.open("a") as file:
        file.write("{half a li")
    assert main(["scaling", "fit", str(ledger), "--bootstraps", "5", "--hold-out", "0"]) == 0
    assert "line 26 is passed over" in capsys.readouterr().err
    assert main(["scaling", "fit", str(tmp_path / "none.jsonl")]) == 1
    assert "There is no ledger at" in capsys.readouterr().err
    assert main(["scaling", "fit", str(ledger), "--convention", "palm"]) == 1
    assert "Known for them: products" in capsys.readouterr().err


def test_runs_of_others_are_taken_in(tmp_path, capsys):
    (tmp_path / "table.csv").write_text("N,D,loss\n1e6,2e7,4.5\n2e6,2e7,4.25\n")
    words = ["scaling", "import", str(tmp_path / "table.csv"), "--ledger", str(tmp_path / "l.jsonl")]
    assert main(words) == 0
    assert "2 runs added" in capsys.readouterr().out
    assert main(words) == 1
    assert "line 1 of" in capsys.readouterr().err


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"line {number} of many, and so on and so forth " * 12)
    content = {
        "base": "scaling/isoflop_quickstart",
        "trainer": {"logger": False, "enable_checkpointing": False, "callbacks": ["Perplexity"], "accelerator": "cpu"},
        "model": {"model": {"context_length": 16}},
        "data": {"train": "corpus", "context_length": 16, "batch_size": 2},
        "sweep": {
            "flops": [2e7],
            "held_out_flops": None,
            "models": [{"model.model.d_model": 8}, {"model.model.d_model": 16}],
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_sweep_trains_records_and_goes_on(recipe, tmp_path, capsys):
    words = ["sweep", "--config", str(recipe), "--ledger", "runs/ledger.jsonl"]
    assert main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "runs" / "ledger.jsonl").exists()
    assert main(words) == 0
    records = RunLedger(tmp_path / "runs" / "ledger.jsonl").read()
    assert sorted(record.hyper_parameters["model.model.d_model"] for record in records) == [8, 16]
    for record in records:
        assert record.flops("products") == pytest.approx(2e7, rel=0.2)  # to the nearest step
        assert record.tokens == record.hyper_parameters["trainer.max_steps"] * 2 * 16
        assert record.loss_name == "val/loss"
    printed = capsys.readouterr().out
    assert "2 runs, " in printed
    assert "[  2/2]" in printed
    assert re.search(r"\[  1/2\].* 0:\d\d left\n", printed)
    assert re.search(r"0:\d\d of wall time, \d+ CPU-seconds", printed)
    assert "lightning-lm scaling fit" in printed
    assert main(words) == 0
    assert capsys.readouterr().out.count("in the ledger already") == 2


def test_a_sweep_says_what_it_needs(recipe, capsys):
    assert main(["sweep", "--config", "pretrain/quickstart", "--ledger", "l.jsonl"]) == 2
    assert "has no sweep: block" in capsys.readouterr().err
    (recipe.parent / "wrong.yaml").write_text("base: small.yaml\nsweep: {budgets: [1]}\n")
    assert main(["sweep", "--config", "wrong.yaml", "--ledger", "l.jsonl"]) == 2
    assert "knows no budgets; its keys are" in capsys.readouterr().err


def test_every_model_is_trained_with_every_combination_and_described_once(recipe, tmp_path, capsys, monkeypatch):
    built = []
    monkeypatch.setattr(sweep_plan, "_described", described_by(sweep_plan._described, built))
    models = [{"model.model.d_model": 8}, {"model.model.d_model": 16}]
    grid = {"model.optimizer.init_args.lr": [0.01, 0.02, 0.04]}
    block = {"flops": [], "models": models, "grid": grid}
    (tmp_path / "grid.yaml").write_text(
        yaml.safe_dump({"base": "small.yaml", "trainer": {"max_steps": 2}, "sweep": block})
    )
    assert main(["sweep", "--config", "grid.yaml", "--ledger", "l.jsonl", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "6 runs, " in printed
    assert printed.index("d_model=8, lr=0.04") < printed.index("d_model=16, lr=0.01")
    assert [settings["model.model.d_model"] for settings in built] == [8, 16]
    block = {"models": models[:1], "grid": {name: rates[:1] for name, rates in grid.items()}}
    logged = {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "try"}}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"base": "grid.yaml", "trainer": logged, "sweep": block}))
    assert main(["sweep", "--config", "one.yaml", "--ledger", "l.jsonl"]) == 0
    (config,) = (tmp_path / "l_runs").glob("*.yaml")
    assert [file.parent.name for file in (tmp_path / "runs" / "try").rglob("metrics.csv")] == [config.stem]
    assert "\n  lightning-lm scaling transfer l.jsonl " in capsys.readouterr().out


def described_by(function, calls):
    def described(configs, settings):
        calls.append(settings)
        return function(configs, settings)

    return described
