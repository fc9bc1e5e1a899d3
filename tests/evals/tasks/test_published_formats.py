"""Every published task, from files as its authors or the Hub publish them."""

import json

import pytest
from evals.tasks.small_data import Oracle, Uniform, score, write_lines, write_rows, write_table

from lightning_lm.errors import DataError
from lightning_lm.evals.tasks import by_name


def first(task, index=0):
    return task.items()[index].requests[0].prompt.text


def continuations(task, index=0):
    return [request.continuation for request in task.items()[index].requests]


MMLU_ROWS = [["What is 1+1?", "1", "2", "3", "4", "B"], ['He said, "A"', "w", "x", "y", "z", "D"]]


def test_mmlu_from_the_authors_files(tmp_path):
    for split, rows in (("dev", [[f"E{n}", *"abcdA"] for n in range(5)]), ("val", MMLU_ROWS), ("test", MMLU_ROWS)):
        for subject in ("abstract_algebra", "anatomy"):
            write_rows(tmp_path / "data" / split / f"{subject}_{split}.csv", rows)
    task = by_name("mmlu", data=tmp_path)
    items = task.items()
    assert [item.gold for item in items] == [1, 3, 1, 3]
    assert {item.subject for item in items} == {"abstract_algebra", "anatomy"}
    assert continuations(task) == [" A", " B", " C", " D"]
    one = "What is 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    two = 'He said, "A"\nA. w\nB. x\nC. y\nD. z\nAnswer:'
    head = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    bare = by_name("mmlu", data=tmp_path, shots=0)
    assert first(bare, 1) == head + two
    write_rows(tmp_path / "data" / "dev" / "anatomy_dev.csv", [["T", "a", "b", "c", "d", "A"], *MMLU_ROWS])
    shown = by_name("mmlu", data=tmp_path, shots=2)
    assert first(shown, 3).endswith(f"T\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n{one} B\n\n{two}")
    assert score(task, Uniform())["acc"] == 0.25


def test_mmlu_from_the_hub(tmp_path):
    rows = [{"question": "Q", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 2}]
    write_table(tmp_path / "mmlu" / "all" / "test-00000-of-00001.parquet", rows)
    write_table(tmp_path / "mmlu" / "law" / "test-00000-of-00001.parquet", rows)  # the same again
    (item,) = by_name("mmlu", data=tmp_path, shots=0).items()
    assert (item.gold, item.subject) == (2, "law")


def test_mmlu_with_a_broken_line(tmp_path):
    write_rows(tmp_path / "test" / "law_test.csv", [MMLU_ROWS[0], ["Q", "a", "b"]])
    with pytest.raises(DataError, match=r"law_test.csv, line 2 has 3 columns"):
        by_name("mmlu", data=tmp_path, shots=0).items()


def test_mmlu_pro(tmp_path):
    row = {
        "question_id": 1,
        "question": "Q?",
        "options": ["x", "y", "z"],
        "answer": "C",
        "answer_index": 2,
        "category": "law",
    }
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", [{**row, "cot_content": ""}])
    solved = {**row, "question": "S?", "cot_content": "A: Let's think step by step. So the answer is (C)."}
    write_table(tmp_path / "data" / "validation-00000-of-00001.parquet", [solved])
    task = by_name("mmlu_pro", data=tmp_path, shots=1)
    options = "Options:\nA. x\nB. y\nC. z\nAnswer: Let's think step by step."
    assert first(task) == f"Question:\nS?\n{options} So the answer is (C).\n\nQuestion:\nQ?\n{options}"
    assert score(task, Oracle(lambda _: "Hence the answer is (C)."))["exact_match"] == 1
    assert score(task, Oracle(lambda _: "C"))["exact_match"] == 0


@pytest.mark.parametrize("form", ["authors", "hub"])
def test_hellaswag(tmp_path, form):
    record = {
        "ind": 4,
        "activity_label": "Baking",
        "ctx_a": "A bowl. [title] Mix",
        "ctx_b": "she STIRS",
        "ctx": "",
        "endings": ["[step] it .", "b", "c", "d"],
        "source_id": "wikihow~1",
        "split": "val",
        "split_type": "zeroshot",
    }
    if form == "authors":
        write_lines(tmp_path / "hellaswag_val.jsonl", [{**record, "label": 3}])
        write_lines(tmp_path / "hellaswag_test.jsonl", [record])
    else:
        write_table(tmp_path / "data" / "validation-00000-of-00001.parquet", [{**record, "label": "3"}])
    task = by_name("hellaswag", data=tmp_path)
    assert first(task) == "Baking: A bowl.. Mix She stirs"
    assert continuations(task)[:2] == ["  it .", " b"]
    assert task.items()[0].gold == 3
    assert task.main_metric == "acc_norm"
    if form == "authors":
        with pytest.raises(DataError, match=r"gold='label'.*got None.*split=validation"):
            by_name("hellaswag", data=tmp_path, split="test").items()


@pytest.mark.parametrize("form", ["authors", "hub"])
@pytest.mark.parametrize(("name", "folder"), [("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")])
def test_arc(tmp_path, form, name, folder):
    for other in ("ARC-Easy", "ARC-Challenge"):
        choices, labels = ["a", "b", "c", "d", "e"], "12345"
        if form == "authors":
            listed = [{"text": text, "label": label} for text, label in zip(choices, labels, strict=True)]
            record = {"id": "x", "question": {"stem": f"{other}?", "choices": listed}, "answerKey": "5"}
            write_lines(tmp_path / "ARC-V1-Feb2018-2" / other / f"{other}-Test.jsonl", [record])
        else:
            record = {
                "id": "x",
                "question": f"{other}?",
                "choices": {"text": choices, "label": [*labels]},
                "answerKey": "5",
            }
            write_table(tmp_path / "arc" / other / "test-00000-of-00001.parquet", [record])
    task = by_name(name, data=tmp_path)
    assert first(task) == f"Question: {folder}?\nAnswer:"
    assert task.items()[0].gold == 4
    assert task.chance == pytest.approx(0.2)


def test_files_in_two_formats_and_repeated_ones_are_read_once(tmp_path):
    listed = [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]
    record = {"id": "x", "question": {"stem": "Why?", "choices": listed}, "answerKey": "A"}
    for folder, stem, task in (
        ("ARC-V1-Feb2018-2/ARC-Easy", "ARC-Easy-Test", "arc_easy"),
        ("OpenBookQA-V1-Sep2018/Data/Main", "test", "openbookqa"),
    ):
        write_lines(tmp_path / folder / f"{stem}.jsonl", [record])
        write_rows(tmp_path / folder / f"{stem}.csv", [["questionID", "question"], ["x", "Why? (A) a (B) b"]])
        assert len(by_name(task, data=tmp_path).items()) == 1
    write_lines(tmp_path / "OpenBookQA-V1-Sep2018/Data/Additional/test_complete.jsonl", [record])
    assert len(by_name("openbookqa", data=tmp_path).items()) == 1
    answer = {"Aliases": ["Nile"], "Value": "Nile"}
    questions = [{"Question": f"River {name}", "QuestionId": name, "Answer": answer} for name in "abc"]
    folder = tmp_path / "triviaqa-rc" / "qa"
    folder.mkdir(parents=True)
    for name, chosen in {
        "web-dev": questions[:2],
        "wikipedia-dev": questions[1:],
        "verified-web-dev": questions[:1],
        "web-train": questions,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps({"Data": chosen}, indent=1))
    assert [item.requests[0].prompt.question[10:17] for item in by_name("triviaqa", data=tmp_path).items()] == [
        "River a",
        "River b",
        "River c",
    ]
    problem = {"task_id": 11, "text": "Add.", "code": "", "test_list": ["assert True"]}
    write_lines(tmp_path / "mbpp" / "mbpp.jsonl", [problem])
    (tmp_path / "mbpp" / "sanitized-mbpp.json").write_text(json.dumps([{**problem, "prompt": "Add."}]))
    assert len(by_name("mbpp", data=tmp_path, shots=0).items()) == 1


@pytest.mark.parametrize("form", ["authors", "hub"])
def test_piqa(tmp_path, form):
    records = [{"goal": "Open a jar", "sol1": "Turn.", "sol2": "Sing."}] * 2
    if form == "authors":
        write_lines(tmp_path / "dev.jsonl", records)
        (tmp_path / "dev-labels.lst").write_text("0\n1\n")
    else:
        records = [{**record, "label": label} for label, record in enumerate(records)]
        write_table(tmp_path / "data" / "validation-00000-of-00001.parquet", records)
    task = by_name("piqa", data=tmp_path)
    assert [item.gold for item in task.items()] == [0, 1]
    assert first(task) == "Question: Open a jar\nAnswer:"
    assert continuations(task) == [" Turn.", " Sing."]


def test_piqa_with_too_few_labels(tmp_path):
    write_lines(tmp_path / "dev.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}] * 2)
    (tmp_path / "dev-labels.lst").write_text("0\n")
    with pytest.raises(DataError, match=r"line 2: .*dev-labels.lst has 1 labels"):
        by_name("piqa", data=tmp_path).items()


def test_winogrande_scores_what_follows_the_gap(tmp_path):
    record = {"qID": "1", "sentence": "The cup broke the _ because it was hard.", "option1": "jug", "option2": "vase"}
    write_lines(tmp_path / "winogrande_1.1" / "dev.jsonl", [{**record, "answer": "2"}])
    shown = {**record, "sentence": "Ann saw _ .", "option1": "Bo", "option2": "Cy", "answer": "1"}
    for size in ("xs", "xl"):
        write_lines(tmp_path / "winogrande_1.1" / f"train_{size}.jsonl", [{**shown, "option1": f"Bo{size}"}])
    task = by_name("winogrande", data=tmp_path, shots=1)
    (item,) = task.items()
    assert item.gold == 1
    prompts = [request.prompt.text for request in item.requests]
    assert prompts == [f"Ann saw Boxl .\n\nThe cup broke the {name}" for name in ("jug", "vase")]
    assert continuations(task) == [" because it was hard."] * 2


@pytest.mark.parametrize(("field", "value"), [("answer", True), ("label", 1), ("label", True)])
def test_boolq(tmp_path, field, value):
    record = {"question": "is it", "passage": "It is.", field: value}
    write_lines(tmp_path / "val.jsonl", [record, {**record, field: not value}])
    task = by_name("boolq", data=tmp_path)
    assert [item.gold for item in task.items()] == [1, 0]
    assert first(task) == "It is.\nQuestion: is it?\nAnswer:"
    assert continuations(task) == [" no", " yes"]
    assert task.items()[0].cluster == task.items()[1].cluster is not None


def test_openbookqa(tmp_path):
    listed = [{"text": text, "label": label} for text, label in zip("wxyz", "ABCD", strict=True)]
    record = {"id": "7", "question": {"stem": "The sun is", "choices": listed}, "answerKey": "C"}
    write_lines(tmp_path / "OpenBookQA-V1-Sep2018" / "Data" / "Main" / "test.jsonl", [record])
    write_lines(tmp_path / "OpenBookQA-V1-Sep2018" / "Data" / "Additional" / "test_complete.jsonl", [record] * 2)
    (item,) = by_name("openbookqa", data=tmp_path).items()
    assert item.gold == 2
    assert item.requests[2].prompt.text + item.requests[2].continuation == "The sun is y"


@pytest.mark.parametrize("form", ["lambada_test_plain_text.txt", "lambada_test.jsonl", "data/test-00000.parquet"])
def test_lambada(tmp_path, form):
    texts = ["he saw the light", "a  b c's"]
    path = tmp_path / form
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts))
    else:
        (write_lines if path.suffix == ".jsonl" else write_table)(path, [{"text": text} for text in texts])
    task = by_name("lambada", data=tmp_path)
    assert [first(task, index) for index in (0, 1)] == ["he saw the", "a  b"]
    assert [continuations(task, index) for index in (0, 1)] == [[" light"], [" c's"]]


@pytest.mark.parametrize("form", ["authors", "hub"])
def test_triviaqa(tmp_path, form):
    if form == "authors":
        answer = {"Aliases": ["Nile", "River Nile"], "Value": "The Nile"}
        path = tmp_path / "triviaqa-unfiltered" / "unfiltered-web-dev.json"
        path.parent.mkdir()
        path.write_text(
            json.dumps({"Data": [{"Question": "Longest river?", "QuestionId": "1", "Answer": answer}]}, indent=1)
        )
    else:
        answer = {"aliases": ["Nile", "River Nile"], "value": "The Nile"}
        record = {"question": "Longest river?", "question_id": "1", "answer": answer}
        write_table(tmp_path / "rc.nocontext" / "validation-00000-of-00001.parquet", [record])
    task = by_name("triviaqa", data=tmp_path)
    assert first(task) == "Question: Longest river??\nAnswer:"
    assert score(task, Oracle(lambda _: " river nile!"))["exact_match"] == 1
    assert score(task, Oracle(lambda _: " river"))["exact_match"] == 0


def test_gsm8k_strict_and_flexible(tmp_path):
    record = {"question": "2 + 1,000?", "answer": "2 + 1,000 = <<2+1000=1002>>1,002\n#### 1,002"}
    write_lines(tmp_path / "gsm8k" / "test.jsonl", [record])
    write_lines(
        tmp_path / "gsm8k" / "train.jsonl", [{"question": f"{n}?", "answer": f"So.\n#### {n}"} for n in range(6)]
    )
    task = by_name("gsm8k", data=tmp_path)
    assert first(task).startswith("Question: 0?\nAnswer: So.\n#### 0\n\nQuestion: 1?")
    assert first(task).endswith("#### 4\n\nQuestion: 2 + 1,000?\nAnswer:")
    expected = {
        " So\n#### 1002": (1, 1),
        " It is $1,002.": (0, 1),
        "#### 1002 or 3": (1, 0),
        "nothing": (0, 0),
        "": (0, 0),
    }
    for said, (strict, flexible) in expected.items():
        metrics = score(task, Oracle(lambda _, said=said: said))
        assert (metrics["strict_match"], metrics["flexible_extract"]) == (strict, flexible), said


def test_math(tmp_path):
    problem = {
        "problem": "Half of 1?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"It is $\boxed{\frac{1}{2}}$.",
    }
    path = tmp_path / "MATH" / "test" / "algebra" / "1.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(problem, indent=2))
    task = by_name("math", data=tmp_path, shots=0)
    assert task.items()[0].subject == "Algebra"
    assert first(task) == "Problem:\nHalf of 1?\n\nSolution:"
    for said, right in {
        r"So \boxed{0.5}": 1,
        "Final answer is 1/2. I hope it is correct": 1,
        "The answer is 2.": 0,
        "no": 0,
    }.items():
        assert score(task, Oracle(lambda _, said=said: said))["exact_match"] == right, said


def test_humaneval(tmp_path):
    record = {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef add(x: List[int]) -> int:\n    """Sum."""\n',
        "entry_point": "add",
        "canonical_solution": "    return sum(x)\n",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n",
    }
    write_lines(tmp_path / "HumanEval.jsonl.gz", [record])
    task = by_name("humaneval", data=tmp_path)
    (item,) = task.items()
    assert (item.id, first(task)) == ("HumanEval/0", record["prompt"])
    completions = [
        record["canonical_solution"],
        "    return 3\n",
        "    return 4\n",
        "Sure:\n```python\ndef add(x: List[int]) -> int:\n    return sum(x)\n```\nDone.",
    ]
    several = by_name("humaneval", data=tmp_path, samples=4)
    metrics = score(several, Oracle(lambda _: completions))
    assert metrics["pass"] == 0.75
    assert metrics["pass_pass@2"] == 1.0
    assert "pass_maj@2" not in metrics
    assert item.requests[0].stop == ()  # a line that begins with def stands in every fenced answer
    goes_on = "    return sum(x)\n\n\ndef broken(:\n"
    assert score(task, Oracle(lambda _: goes_on))["pass"] == 1.0


def test_mbpp(tmp_path):
    def problem(number):
        tests = [f"assert f({n}) == {n + number}" for n in range(3)]
        code = f"def f(n):\r\n  return n + {number}"
        return {
            "task_id": number,
            "text": f"Add {number}.",
            "code": code,
            "test_list": tests,
            "test_setup_code": "",
            "challenge_test_list": [],
        }

    write_lines(tmp_path / "mbpp.jsonl", [problem(number) for number in (1, 2, 3, 4, 11, 510, 511, 601)])
    task = by_name("mbpp", data=tmp_path)
    assert [item.id for item in task.items()] == ["11", "510"]
    text = first(task)
    assert text.count("[BEGIN]") == 4
    assert text.startswith(
        "You are an expert Python programmer, and here is your task: Add 2. Your code should pass these tests:\n\n"
        "assert f(0) == 2\n"
    )
    assert "return n + 4\n[DONE]\n\nYou are" in text
    assert text.endswith("assert f(2) == 13\n[BEGIN]\n")
    said = Oracle(lambda prompt: "def f(n):\n    return n + 11" if "Add 11." in prompt else "def f(n): return 0")
    assert score(task, said)["pass"] == 0.5
    assert len(by_name("mbpp", data=tmp_path, split="validation").items()) == 1


@pytest.mark.parametrize("form", ["raw", "lines", "pages"])
def test_wikitext(tmp_path, form):
    pages = [
        ' \n = One = \n \n A dog , a cat ( or " two " ) . \n = = Part = = \n It \'s 1 @,@ 000 . \n',
        " \n = Two = \n \n End . \n",
    ]
    if form == "raw":
        (tmp_path / "wiki.test.raw").write_text("".join(pages))
    else:
        lines = "".join(pages).splitlines(keepends=True)
        records = [{"page": page} for page in pages] if form == "pages" else [{"text": line} for line in lines]
        write_table(tmp_path / "data" / "test-00000-of-00001.parquet", records)
    task = by_name("wikitext", data=tmp_path)
    items = task.items()
    assert len(items) == 2
    assert items[0].requests[0].text.strip() == '= One =\n\nA dog, a cat (or "two").\n== Part ==\nIt\'s 1,000.'
    assert sum(item.gold[1] for item in items) >= len("".join(pages).strip().encode())


def test_a_folder_of_several_tasks_and_the_folder_of_one(tmp_path):
    write_lines(tmp_path / "all" / "gsm8k" / "test.jsonl", [{"question": "1?", "answer": "#### 1"}])
    write_lines(tmp_path / "all" / "boolq" / "test.jsonl", [{"question": "1?", "answer": True, "passage": ""}])
    for data in (tmp_path / "all", tmp_path / "all" / "gsm8k", tmp_path / "all" / "gsm8k" / "test.jsonl"):
        assert first(by_name("gsm8k", data=data, shots=0)) == "Question: 1?\nAnswer:"
