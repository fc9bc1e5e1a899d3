"""What ``lightning-lm scaling`` says to a user who makes a mistake: what came, what is needed, what to change."""

import pytest

from lightning_lm.cli import main


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("no_loss.csv", "N,D\n1e6,2e7\n", "has columns N, D; needed are the loss and two of parameters, tokens, FLOPs"),
        ("one_axis.csv", "N,loss\n1e6,2\n", "has columns N, loss; needed are the loss and two of"),
        ("negative.csv", "N,D,loss\n1e6,2e7,-2\n", "row 1, column loss holds '-2'; it must be positive and finite"),
        ("nan.csv", "N,D,loss\n1e6,2e7,3\n1e6,4e7,nan\n", "row 2, column loss holds 'nan'"),
        ("words.csv", "N,D,loss\n1e6,2e7,low\n", "column loss holds 'low', which is no number"),
        ("empty.csv", "", "holds no run"),
        ("half.json", '[{"N": 1e6}', "cannot be read as a table of runs"),
        ("sheet.xlsx", "", "save it as .csv, .json, .jsonl"),
        ("none.csv", None, "There is no table at none.csv"),
    ],
)
def test_a_table_that_cannot_be_taken_in(name, text, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["scaling", "import", name, "--ledger", "ledger.jsonl"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "ledger.jsonl").exists()


def test_from_a_table_to_a_fit_the_command_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.csv").write_text("N,D,loss\n1e6,2e7,3.1\n")
    assert main(["scaling", "import", "one.csv", "--ledger", "l.jsonl"]) == 0
    assert "lightning-lm scaling fit l.jsonl --convention total" in capsys.readouterr().out
    assert main(["scaling", "fit", "l.jsonl"]) == 1
    assert "Known for them: total; choose one of these" in capsys.readouterr().err
    assert main(["scaling", "fit", "l.jsonl", "--convention", "total"]) == 1
    assert "1 runs cannot fix" in capsys.readouterr().err
    assert main(["scaling", "transfer", "l.jsonl"]) == 1
    assert "runs of a sweep" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["scaling", "fit", "empty.jsonl"]) == 1
    assert "holds no finished run: train with ScalingLaw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "0"], "--budget: 0 must be above 0"),
        (["--budget", "nan"], "--budget: nan must be above 0"),
        (["--budget", "1e19", "--convention", "mine"], "there are non_embedding, kaplan, total"),
        (["--budget", "1e19", "--peak-flops", "4e14", "--mfu", "40"], "--mfu: 40 must be above 0 and at most 1"),
        (["--budget", "1e19", "--peak-flops", "0"], "--peak-flops: 0 must be above 0"),
    ],
)
def test_a_plan_that_cannot_be_made(words, said, capsys):
    try:
        status = main(["scaling", "plan", *words])
    except SystemExit as ended:
        status = ended.code
    assert status in (1, 2)
    assert said in capsys.readouterr().err
