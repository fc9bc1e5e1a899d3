"""The verb ``evaluate``: tasks by name and from YAML, results as JSON, broken runs that go on, comparing, mistakes."""

import json
import shutil
from typing import get_args

import pytest
from served_models import tiny_model, tiny_tokenizer

from lightning_lm.cli import main
from lightning_lm.cli.evaluate import _VOTES, _base, _digest, tasks_of
from lightning_lm.data import tokenize
from lightning_lm.evals import AnswerCheck, LocalModel, RandomShots, SameText, by_name, names
from lightning_lm.evals.tasks.generation_task import Vote
from lightning_lm.models import save_huggingface

QUIZ = """
class_path: ChoiceTask
init_args: {name: quiz, data: quiz.jsonl, question: "Question: {{ question }}\\nAnswer:", choices: options,
  gold: options.index(right)}
"""
OWN_CLASS = '''
import dataclasses

from lightning_lm.evals import ChoiceTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums(ChoiceTask):
    """Sums of two numbers."""

    def prepared(self, record):
        """Return the record as a question with two choices."""
        left, right = record["numbers"]
        return {"question": f"{left} + {right} =", "choices": [str(left + right), "none"], "answer": 0}
'''


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two Hugging Face folders with tiny models."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_huggingface(tiny_model(seed), folder / str(seed), tiny_tokenizer())
    return folder / "0", folder / "1"


@pytest.fixture
def workplace(folders, tmp_path, monkeypatch):
    """A current folder with a task of one's own and the first model."""
    records = [{"question": f"Q{n}", "options": ["yes", "no"], "right": ("yes", "no")[n % 2]} for n in range(9)]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "quiz.yaml").write_text(QUIZ)
    (tmp_path / "model").symlink_to(folders[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def evaluated(*words, checkpoint="model"):
    return main(["evaluate", "--checkpoint", str(checkpoint), "--device", "cpu", *words])


def test_list_names_every_task(capsys):
    assert main(["evaluate", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(names())
    assert max(map(len, lines)) <= 100
    assert all(len(line.split()) > 3 for line in lines), "each with what it asks"


def test_results_say_what_was_asked_and_of_whom(workplace, capsys):
    assert evaluated("--tasks", "quiz.yaml,reverse", "--limit", "6", "--seed", "3", "--output", "a.json") == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("quiz, acc ", "  acc_norm ", "95 % interval", "reverse, exact_match", "a.json (")
    )
    assert not list(workplace.glob("a.json.*")), "the journal goes when the results are written"
    content = json.loads((workplace / "a.json").read_text())
    assert [task["name"] for task in content["tasks"]] == ["quiz", "reverse"]
    assert content["settings"] == {"seed": 3, "limit": 6}
    assert content["model"]["checkpoint"].endswith("model")
    assert len(content["model"]["sha256"]) == 64
    quiz = content["tasks"][0]
    model = LocalModel(tiny_model(), tiny_tokenizer())
    asked = [item for number, item in enumerate(by_name("quiz.yaml").items()) if number in (0, 1, 3, 4, 6, 7)]
    answers = model.log_likelihoods([request for item in asked for request in item.requests])
    right = [
        answers[2 * number + item.gold].logprob > answers[2 * number + 1 - item.gold].logprob
        for number, item in enumerate(asked)
    ]
    assert [item["scores"]["acc"] for item in quiz["items"]] == right
    assert quiz["scores"]["acc"]["value"] == pytest.approx(sum(right) / 6)


def test_a_broken_run_goes_on(workplace, monkeypatch, capsys):
    words = ("--tasks", "quiz.yaml,reverse", "--limit", "4", "--output", "a.json")
    ask = LocalModel.generate
    asked = []

    def stopped(self, requests):
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalModel, "generate", stopped)
    assert evaluated(*words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (workplace / "a.json").exists()
    monkeypatch.setattr(LocalModel, "generate", ask)
    monkeypatch.setattr(LocalModel, "log_likelihoods", lambda self, requests: asked.append(requests))
    assert evaluated(*words) == 0
    assert asked == [], "the answers of the first task were kept"
    assert len(json.loads((workplace / "a.json").read_text())["tasks"][0]["items"]) == 4


def test_the_journal_of_other_files_of_the_model_is_not_used(workplace, monkeypatch):
    """The template, the model of adapters and the version decide what is asked, and by whom it is answered."""
    model, base = workplace / "copy", workplace / "base"
    for folder in (model, base):
        shutil.copytree(workplace / "model", folder)
    digest = _digest(model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert _digest(model) != digest
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    found = _base(model, None)
    assert found["base_sha256"] == _digest(base)
    (base / "tokenizer_config.json").write_text("{}")
    assert _base(model, base)["base_sha256"] != found["base_sha256"]
    assert _base(workplace / "model", None) == {}


def test_items_in_training_data_are_counted_beside_the_score(workplace, capsys):
    (workplace / "corpus.txt").write_text("He asked: " + by_name("quiz.yaml").items()[0].text)
    tokenize(["nothing", "Q3 no"], tiny_tokenizer(), workplace / "store", num_workers=0, show_progress=False)
    for path, found in (("corpus.txt", {0}), ("store", {3})):
        words = ("--tasks", "quiz.yaml,reverse", "--limit", "9", "--output", "a.json", "--ngram", "2")
        assert evaluated(*words, "--contamination", path) == 0
        assert "1 of 9 items share 2 words" in " ".join(capsys.readouterr().out.split())
        content = json.loads((workplace / "a.json").read_text())
        names = [item["id"] for item in content["tasks"][0]["items"]]
        assert {names.index(name) for name in content["tasks"][0]["contamination"]["overlaps"]} == found
        assert content["core"]["num_items"] == 2


def test_compare_tells_two_models_apart(workplace, folders, capsys):
    for path, checkpoint in zip(("a.json", "b.json"), folders, strict=True):
        assert evaluated("--tasks", "quiz.yaml", "--output", path, checkpoint=checkpoint) == 0
    capsys.readouterr()
    assert main(["evaluate", "compare", "a.json", "b.json"]) == 0
    printed = capsys.readouterr().out
    first, second = (json.loads((workplace / path).read_text())["tasks"][0] for path in ("a.json", "b.json"))
    values = [task["scores"]["gold_logprob"]["value"] for task in (first, second)]
    assert f"{values[0] - values[1]:+.3f}" in printed
    assert "McNemar" in printed
    assert main(["evaluate", "compare", "a.json"]) == 2
    assert "compare A.json B.json" in capsys.readouterr().err
    assert main(["evaluate", "compare", "a.json", "quiz.jsonl"]) == 1
    assert "is no result of `lightning-lm evaluate --output`" in capsys.readouterr().err
    assert evaluated("--tasks", "quiz.yaml", "--limit", "3", "--output", "b.json") == 0
    assert main(["evaluate", "compare", "a.json", "b.json"]) == 1
    assert "different items or prompts" in capsys.readouterr().err


def test_a_file_lists_tasks_with_settings_and_classes_of_the_user(workplace, capsys):
    (workplace / "lists").mkdir()
    (workplace / "lists" / "sums.jsonl").write_text('{"numbers": [1, 2]}\n{"numbers": [3, 4]}\n')
    (workplace / "own_sums.py").write_text(OWN_CLASS)
    (workplace / "lists" / "mine.yaml").write_text(
        "tasks:\n- {task: arithmetic, num_items: 4, max_new_tokens: 2}\n- {task: quiz.yaml, name: again}\n"
        "- class_path: own_sums.Sums\n  init_args: {name: sums, data: sums.jsonl}\n"
    )
    assert evaluated("--tasks", "lists/mine.yaml,quiz.yaml", "--output", "a.json") == 0
    tasks = json.loads((workplace / "a.json").read_text())["tasks"]
    assert {task["name"]: len(task["items"]) for task in tasks} == {"arithmetic": 4, "again": 9, "sums": 2, "quiz": 9}
    assert "1 + 2 =" in tasks[2]["first_prompt"]
    for text, message in {
        "tasks: quiz": "must have a list of tasks",
        "tasks: [": "is no YAML",
        "tasks: []": "names no task",
        "tasks: [{task: reverse, shots: few}]": "shots='few' must be a number of examples",
        "tasks: [{task: reverse, 3: 4}]": "has no 3; it has",
        "tasks: [{class_path: own_sums.Sum}]": "own_sums has no class 'Sum'",
        "tasks: [{class_path: no_such.Sum}]": "no_such.Sum cannot be imported",
        "tasks: [{class_path: ChoiceTask, init_args: {nam: x}}]": "ChoiceTask has no field ['nam']",
    }.items():
        (workplace / "wrong.yaml").write_text(text)
        assert evaluated("--tasks", "wrong.yaml") == 1
        assert message in capsys.readouterr().err


def test_votes_are_those_of_tasks(capsys):
    assert get_args(Vote) == _VOTES
    with pytest.raises(SystemExit):
        evaluated("--tasks", "arithmetic", "--samples", "2", "--vote", "most")
    assert "invalid choice: 'most'" in capsys.readouterr().err


def test_a_recipe_lists_tasks(workplace):
    assert evaluated("--tasks", "evaluate/offline", "--limit", "2", "--output", "a.json") == 0
    tasks = json.loads((workplace / "a.json").read_text())["tasks"]
    assert [task["name"] for task in tasks] == ["docs_choice", "docs_cloze", "reverse", "arithmetic"]


def test_a_list_has_settings_and_parts_of_published_tasks(tmp_path):
    (tmp_path / "list.yaml").write_text(
        "tasks:\n- task: gsm8k\n  shots: {class_path: RandomShots, init_args: {num: 3}}\n"
        "  checks: {exact: {class_path: AnswerCheck, init_args: {same: {class_path: SameText}}}}\n"
    )
    (task,) = tasks_of(str(tmp_path / "list.yaml"), None, {})
    assert (task.shots, task.checks) == (RandomShots(num=3), {"exact": AnswerCheck(same=SameText())})
    shots = {task.name: task.shots.num for task in tasks_of("evaluate/published", None, {})}
    assert (shots["hellaswag"], shots["arc_challenge"], shots["piqa"], shots["gsm8k"]) == (10, 25, 0, 5)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--tasks", "helaswag"], 1, "Did you mean 'hellaswag'?"),
        (["--tasks", "evaluate/none"], 1, "There is no task 'evaluate/none'"),
        (["--tasks", "none.yaml"], 1, "none.yaml"),
        (["--tasks", "gsm8k"], 1, "openai/gsm8k --local-dir DATA/gsm8k, then --data DATA"),
        (["--tasks", "gsm8k", "--data", "nowhere"], 1, "nowhere"),
        (["--tasks", "quiz.yaml", "--samples", "4"], 1, "has no num_samples"),
        (["--tasks", "quiz.yaml,quiz.yaml"], 1, "Two tasks have one name"),
        (["--tasks", "quiz.yaml", "--shotz"], 2, "unrecognized arguments: --shotz"),
        ([], 2, "needs --tasks and one of --checkpoint and --server"),
    ],
)  # fmt: skip
def test_mistakes_have_a_remedy(words, status, message, workplace, capsys):
    assert evaluated(*words) == status
    assert message in " ".join(capsys.readouterr().err.split())


def test_budgets_of_reasoning_make_a_curve(workplace, capsys):
    words = ("--tasks", "arithmetic", "--limit", "2", "--samples", "2", "--vote", "majority", "--waits", "1")
    assert evaluated(*words, "--thinking-tokens", "2", "4", "--output", "a.json", "--curve", "a.png") == 0
    content = json.loads((workplace / "a.json").read_text())
    assert [task["name"] for task in content["tasks"]] == ["arithmetic@2", "arithmetic@4"]
    assert "Let's think step by step." in content["tasks"][0]["first_prompt"]
    lines = {point["line"] for point in content["curve"]}
    assert "arithmetic, exact_match_maj@2" in lines
    assert (workplace / "a.png").stat().st_size > 5000
    assert evaluated(*words) == 2
    assert "--thinking-tokens 512" in capsys.readouterr().err
    assert evaluated("--tasks", "quiz.yaml", "--chain-of-thought") == 1
    assert "has no reasoning" in " ".join(capsys.readouterr().err.split())
