"""``lightning-lm scaling tasks`` and ``score``: from a ledger to a prediction with a held-out run."""

import json

import numpy as np
import pytest

from lightning_lm.cli import main
from lightning_lm.evals import ItemResult, Results, TaskResults
from lightning_lm.evals.statistics import score_of
from lightning_lm.scaling import RunLedger, RunRecord


def written(path, number, *, is_flat=False):
    """Runs that follow known laws, with the scatter of 800 items."""
    where, ledger = np.random.default_rng(5), RunLedger(path)
    for index, flops in enumerate(np.geomspace(1e17, 1e20, number)):
        cost = 0.4 + 1.2 * (flops / 1e18) ** -0.15
        p = 0.25 if is_flat else 0.25 + 0.75 / (1 + np.exp((cost - 1.1) / 0.12))
        scores = {"acc": int(where.binomial(800, p)) / 800, "gold_bits_per_byte": float(cost)}
        task = {"metric": "acc", "chance": 0.25, "num_items": 800, "scores": scores, "errors": {}}
        ledger.add(
            RunRecord(
                parameters={"products": 1e7}, flops_per_token={"products": 6e7}, tokens=int(flops / 6e7), loss=3.0,
                name=f"run{index}", tasks={"quiz": task},
            )
        )  # fmt: skip
    return path


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scaled(*words):
    return main(["scaling", *words])


def test_a_larger_budget_is_predicted(workplace, capsys):
    written(workplace / "l.jsonl", 8)
    words = ("--predict-flops", "1e21", "1e23", "--plot", "out", "--output", "p.json", "--bootstraps", "100")
    assert scaled("tasks", "l.jsonl", *words) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("quiz: 8 runs", "Held out", "points", "cost_0", "Beware: 1e+03 times"))
    assert (workplace / "out/task.png").read_bytes().startswith(b"\x89PNG")
    assert "task.png" in (workplace / "out/report.md").read_text()
    content = json.loads((workplace / "p.json").read_text())
    assert (content["task"], content["metric"], content["cost_name"], content["chance"]) == (
        "quiz", "acc", "gold_bits_per_byte", 0.25,
    )  # fmt: skip
    assert len(content["runs"]) == 8
    near = content["predictions"][0]
    assert near["cost"]["value"] == pytest.approx(0.4 + 1.2 * 1e3**-0.15, rel=0.01)
    assert near["accuracy"]["low"] < 0.25 + 0.75 / (1 + np.exp((0.8258 - 1.1) / 0.12)) < near["accuracy"]["high"]
    (held,) = content["held_out"]
    assert held["error"] == pytest.approx(held["predicted"]["value"] - held["accuracy"])


def test_chance_all_over_is_said_and_the_cost_still_predicted(workplace, capsys):
    written(workplace / "l.jsonl", 6, is_flat=True)
    assert scaled("tasks", "l.jsonl", "--predict-flops", "1e21", "--output", "p.json", "--bootstraps", "50") == 0
    assert "No prediction of acc: Every run's accuracy is within 2 standard errors of chance" in capsys.readouterr().out
    content = json.loads((workplace / "p.json").read_text())
    assert content["accuracy_fit"] is None
    assert "chance" in content["refused"]["accuracy"]
    assert content["predictions"][0]["cost"]["value"] == pytest.approx(0.4 + 1.2 * 1e3**-0.15, rel=0.01)


def test_chance_is_given_or_follows_from_the_choices(workplace, capsys):
    written(workplace / "l.jsonl", 5)
    for words in (("--choices", "10"), ("--chance", "0.1")):
        assert scaled("tasks", "l.jsonl", *words, "--hold-out", "0", "--bootstraps", "0", "--output", "p.json") == 0
        assert json.loads((workplace / "p.json").read_text())["chance"] == 0.1
    with pytest.raises(SystemExit):
        scaled("tasks", "l.jsonl", "--choices", "4", "--chance", "0.25")


@pytest.mark.parametrize(
    ("number", "words", "message"),
    [
        (2, (), "2 run(s) of 2 budget(s) cannot fix a power law with a floor; give at least 4"),
        (5, ("--task", "riddle"), "The ledger has quiz (5 runs)"),
        (5, ("--metric", "f1"), "has no 'f1' of quiz"),
    ],
)
def test_what_cannot_be_predicted_is_refused(workplace, capsys, number, words, message):
    written(workplace / "l.jsonl", number)
    assert scaled("tasks", "l.jsonl", *words) == 1
    assert message in capsys.readouterr().err


def test_results_of_evaluate_are_added_to_a_run(workplace, capsys):
    ledger = RunLedger(written(workplace / "l.jsonl", 2))
    items = [ItemResult(str(n), {"acc": float(n % 2), "gold_bits_per_byte": 1.5}) for n in range(10)]
    scores = {name: score_of([item.scores[name] for item in items]) for name in ("acc", "gold_bits_per_byte")}
    task = TaskResults("riddle", "acc", 0.2, scores, {}, items, "f", {}, "")
    Results([task], {}, {}, {}).save("r.json")
    assert scaled("score", "l.jsonl", "r.json", "--run", "run1") == 0
    assert "run1: riddle added to l.jsonl." in capsys.readouterr().out
    assert ledger.read()[1].tasks["riddle"] == json.loads(json.dumps(task.summary))
    assert set(ledger.read()[1].tasks) == {"quiz", "riddle"}
    assert scaled("tasks", "l.jsonl") == 1
    assert "scores of quiz, riddle; name one with --task" in capsys.readouterr().err
    assert scaled("score", "l.jsonl", "r.json", "--run", "run9") == 1
    assert "Give an id: run0" in capsys.readouterr().err
