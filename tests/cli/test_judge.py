"""The verb ``evaluate judge``: files in, a table and JSON out; a judge that breaks off, and mistakes."""

import json
import re
import shlex

import pytest
from judge_stub import StubJudge, prefer, shown
from served_models import tiny_model, tiny_tokenizer

from lightning_lm.cli import main
from lightning_lm.errors import RemoteError
from lightning_lm.models import save_huggingface

SERVER = ("--server", "http://localhost:1/v1", "--model-name", "judge")


def judged(*words):
    return main(["evaluate", "judge", *words])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Answers of three models to five questions, in the current folder; longer ones are better."""
    monkeypatch.chdir(tmp_path)
    for name, sizes in {"long": (5, 9, 9, 9, 2), "middle": (5, 5, 5, 10, 3), "short": (1, 5, 1, 1, 9)}.items():
        records = [
            {"prompt": f"Q{n}", "output": name[0] * size, "category": "ab"[n % 2]} for n, size in enumerate(sizes)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def test_pairwise_writes_a_table_and_all_that_repeats_it(files, monkeypatch, capsys):
    stub = StubJudge(prefer(len)).install(monkeypatch)
    words = ("pairwise", "long.jsonl", "short.jsonl", *SERVER, "--output", "out/a.json", "--prices", "2", "10")
    assert judged(*words) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("long against short", "win rate", "0.800", "at equal lengths", "of a"))
    assert "4 wins, 0 ties, 1 losses" in printed
    assert "10 replies (0 of an earlier run), 1,000 tokens in, 100 out, cost 0.00300 (this run 0.00300)" in printed
    assert max(map(len, printed.splitlines())) <= 100
    content = json.loads((files / "out/a.json").read_text())
    assert content["kind"] == "pairwise"
    result = content["result"]
    assert result["comparisons"][0]["verdicts"] == ["first", "first"]
    assert result["counts"] == {"wins": 4, "ties": 0, "losses": 1, "failures": 0}
    assert content["judge"]["model"] == "judge"
    assert "Verdict" in content["template"]
    assert content["cost"]["all"] == pytest.approx(0.003)
    assert judged(*words) == 0
    assert len(stub.requests) == 10, "replies are kept"
    assert "(10 of an earlier run)" in capsys.readouterr().out


def test_a_judge_that_breaks_off_says_what_is_kept(files, monkeypatch, capsys):
    StubJudge(prefer(len), fails_after=4).install(monkeypatch)
    words = ("rank", "long.jsonl", "middle.jsonl", "short.jsonl", *SERVER, "--max-requests", "1", "--output", "r.json")
    assert judged(*words) == 1
    error = capsys.readouterr().err
    assert "cannot be reached" in error
    assert "4 replies are kept in r.json.replies" in error
    assert not (files / "r.json").exists()
    stub = StubJudge(prefer(len)).install(monkeypatch)
    assert judged(*words, "--anchor", "middle") == 0
    assert len(stub.requests) == 2 * 3 * 5 - 4
    printed = capsys.readouterr().out
    assert printed.index("long ") < printed.index("short ")
    assert "middle is the anchor" in printed
    ratings = {one["model"]: one for one in json.loads((files / "r.json").read_text())["result"]["ratings"]["ratings"]}
    assert ratings["middle"]["rating"] == 1000
    assert ratings["long"]["rating"] > ratings["short"]["rating"]


def test_grades_of_mt_bench_files(files, monkeypatch, capsys):
    asked = [{"question_id": n, "category": "math", "turns": ["One?", "Two?"]} for n in range(2)]
    said = [{"question_id": n, "model_id": "v", "choices": [{"turns": ["xxx", "x" * (n + 5)]}]} for n in range(2)]
    (files / "question.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (files / "v.jsonl").write_text("\n".join(map(json.dumps, said)))
    (files / "grade.jinja").write_text("Grade: {{ answers[-1] }}")
    StubJudge(lambda prompt: f"Verdict: {len(prompt.removeprefix('Grade: '))}").install(monkeypatch)
    words = ("--questions", "question.jsonl", "--template", "grade.jinja", "--output", "g.json")
    assert judged("grade", "v.jsonl", *SERVER, *words) == 0
    assert "turn 2" in capsys.readouterr().out
    (result,) = json.loads((files / "g.json").read_text())["result"]
    assert [one["grade"] for one in result["grades"]] == [3, 5, 3, 6]
    assert result["score"]["value"] == 17 / 4


def test_agreement_with_labels(files, monkeypatch, capsys):
    labels = [{"instruction": f"Q{n}", "output_1": "aa", "output_2": "b", "preference": 1 + n % 2} for n in range(4)]
    (files / "labels.json").write_text(json.dumps(labels))
    StubJudge(prefer(len)).install(monkeypatch)
    assert judged("agreement", "labels.json", *SERVER, "--output", "l.json") == 0
    printed = capsys.readouterr().out
    assert "agreement" in printed
    assert "100.0% of 4 pairs" in printed
    assert json.loads((files / "l.json").read_text())["result"]["agreement"]["value"] == 0.5


def test_a_checkpoint_answers_and_another_model_judges_it(files, monkeypatch, capsys):
    save_huggingface(tiny_model(), files / "model", tiny_tokenizer())
    (files / "questions.jsonl").write_text("\n".join(json.dumps({"turns": [f"Q{n}", "And?"]}) for n in range(2)))
    words = ("--checkpoint", "model", "--device", "cpu", "--max-tokens", "5", "--output", "mine.jsonl")
    assert judged("answer", "questions.jsonl", *words, "--limit", "1") == 0
    assert judged("answer", "questions.jsonl", *words) == 0
    assert "2 answers of mine: mine.jsonl. 4 replies (2 of an earlier run)" in capsys.readouterr().out
    records = [json.loads(line) for line in (files / "mine.jsonl").read_text().splitlines()]
    assert [len(record["outputs"]) for record in records] == [2, 2]
    assert records[0]["model"] == "mine"
    StubJudge(lambda prompt: f"Verdict: {min(10, 1 + len(shown(prompt)[None]))}").install(monkeypatch)
    assert judged("grade", "mine.jsonl", *SERVER, "--output", "g.json") == 0
    assert judged("grade", "mine.jsonl", *words[:4], "--max-tokens", "2", "--output", "h.json") == 1
    assert "no verdict to any of its first 4 questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (("pairwise", "long.jsonl", "short.jsonl", "--output", "x"), "needs one of --server and --checkpoint", 2),
        (("pairwise", "long.jsonl", "none.jsonl", *SERVER, "--output", "x"), "none.jsonl", 1),
        (("rank", "long.jsonl", *SERVER, "--output", "x"), "Two models or more", 1),
        (("rank", "long.jsonl", "short.jsonl", *SERVER, "--output", "x", "--anchor", "best"), "'best' is none", 1),
        (("grade", "long.jsonl", *SERVER, "--output", "x", "--body", "[1]"), "no JSON object", 2),
        (("grade", "long.jsonl", *SERVER, "--output", "x", "--body", "{"), "no JSON", 2),
        (
            ("grade", "long.jsonl", *SERVER, "--output", "x", "--by-likelihood"),
            "needs the likelihoods of a --checkpoint",
            2,
        ),
    ],
)
def test_mistakes_are_told(files, monkeypatch, capsys, words, message, status):
    StubJudge(lambda prompt: RemoteError("never asked")).install(monkeypatch)
    assert judged(*words) == status
    assert message in capsys.readouterr().err


def test_help_is_that_of_the_verb(capsys):
    with pytest.raises(SystemExit) as ended:
        judged("rank", "--help")
    assert ended.value.code == 0
    assert "--anchor" in capsys.readouterr().out


def test_the_page_of_the_documentation_runs(files, monkeypatch, capsys, root):
    """Its files are written, its commands are carried out in their order, with a judge in this process."""
    save_huggingface(tiny_model(context_length=4096), files / "SmolLM2-135M", tiny_tokenizer())

    def reply(said):
        text = said if isinstance(said, str) else said[0]["content"]
        if "grade the last answer" in text:
            return "Fine.\nVerdict: 7"
        return (
            prefer(len)(text) if "Everything between marks" in text else "Verdict: A" if "Which" in text else "A word."
        )

    StubJudge(reply).install(monkeypatch)
    monkeypatch.setenv("COLUMNS", "100")
    page = (root / "docs/how-to/judge.md").read_text(encoding="utf-8")
    for language, title, body in re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', page, re.M | re.S):
        if title:
            (files / title).write_text(body)
        elif language == "python":
            exec(compile(body, "judge.md", "exec"), {})
        else:
            for line in filter(None, body.replace("\\\n", " ").splitlines()):
                assert main(shlex.split(line)[1:]) == 0, line
    assert {path.name for path in files.glob("*.json")} >= {
        "pairwise.json", "grades.json", "ranking.json", "agreement.json", "short.json", "small.json",
    }  # fmt: skip
    assert json.loads((files / "ranking.json").read_text())["usage"]["cached"] == 4
    assert json.loads((files / "agreement.json").read_text())["result"]["people"] == 1.0
