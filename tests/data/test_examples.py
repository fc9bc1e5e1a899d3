"""Records from every kind of file, their forms, and the prompts that preferences share."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lightning_lm.data.post_training.examples import Examples, PromptedExamples, as_examples
from lightning_lm.data.post_training.forms import form_of
from lightning_lm.data.post_training.implicit_prompts import split_preference
from lightning_lm.data.post_training.tasks import ReverseDigits
from lightning_lm.errors import ConfigurationError, DataError

RECORDS = [{"prompt": "2+2", "completion": "4", "level": 1}, {"prompt": "é", "completion": "ü", "level": 2}]


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert list(Examples(source=str(tmp_path / name)).records()) == RECORDS
    (tmp_path / "readme.txt").write_text("not data")
    assert list(as_examples(tmp_path).records()) == RECORDS * 3


def test_python_objects_and_functions() -> None:
    assert list(as_examples(RECORDS).records()) == RECORDS
    source = as_examples(lambda: iter(RECORDS))
    assert list(source.records()) == list(source.records()) == RECORDS
    assert as_examples(source) is source


def test_bad_input_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(DataError, match="line 2: expected a JSON object, got list"):
        list(Examples(source=tmp_path / "list.jsonl").records())
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl has no records"):
        list(Examples(str(tmp_path / "empty.jsonl")).records())
    with pytest.raises(DataError, match="There is no file or folder"):
        list(Examples(source=tmp_path / "absent").records())
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="plain text without records"):
        list(Examples(source=tmp_path / "notes.txt").records())
    with pytest.raises(DataError, match="Record 0 is a str"):
        list(as_examples(["text"]).records())


def test_forms() -> None:
    assert form_of({"prompt": "a", "completion": "b"}) == "prompt_completion"
    assert form_of({"messages": []}) == "messages"
    assert form_of({"prompt": "a", "chosen": "b", "rejected": "c"}) == "preference"
    assert form_of({"chosen": "b", "rejected": "c", "prompt": None}) == "preference"
    assert form_of({"prompt": "a", "answer": "4"}) == "prompt"
    with pytest.raises(DataError, match=r"\['question'\]"):
        form_of({"question": "?"})


def test_prompts_are_written_from_other_fields(tmp_path: Path) -> None:
    problems = [{"question": "1 {+} 1?", "answer": "Two.\n#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
    source = PromptedExamples(source=as_examples(problems), prompt="{question} Think in {{braces}}.")
    assert list(source.records()) == [
        problem | {"prompt": f"{problem['question']} Think in {{braces}}."} for problem in problems
    ]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    from_file = PromptedExamples(source=str(tmp_path / "problems.jsonl"), prompt=source.prompt)
    assert list(from_file.records()) == list(source.records())
    assert from_file.fingerprint == source.fingerprint
    assert from_file.fingerprint != PromptedExamples(source=from_file.source, prompt="{answer}").fingerprint


def test_prompts_that_cannot_be_written_are_refused() -> None:
    with pytest.raises(DataError, match=r"needs the field 'problem', and the record has \['answer', 'question'\]"):
        list(PromptedExamples(source=as_examples([{"question": "", "answer": ""}]), prompt="{problem}").records())
    for prompt, message in (("{question", "without its other"), ("{}", "only names"), ("{a.b}", "only names")):
        with pytest.raises(ConfigurationError, match=message):
            PromptedExamples(source=as_examples([]), prompt=prompt)


def test_implicit_prompts() -> None:
    assert split_preference({"prompt": "p", "chosen": "a", "rejected": "b"}) == ("p", "a", "b")
    user, good, bad = (
        {"role": role, "content": content} for role, content in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
    )
    assert split_preference({"chosen": [user, good], "rejected": [user, bad]}) == ([user], [good], [bad])
    with pytest.raises(DataError, match="are the same"):
        split_preference({"chosen": "a", "rejected": "a"})
    with pytest.raises(DataError, match="use one kind"):
        split_preference({"chosen": "a", "rejected": [good]})


def test_reversal_holds_out_what_it_says() -> None:
    train = list(ReverseDigits(num_examples=2000, seed=3).records())
    held_out = list(ReverseDigits(num_examples=300, held_out=True).records())
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert held_out == list(ReverseDigits(num_examples=300, held_out=True, seed=9).records())
    assert train == list(ReverseDigits(num_examples=2000, seed=3).records())
    assert train != list(ReverseDigits(num_examples=2000, seed=4).records())
    wrong = [r for r in train if r["completion"] != r["answer"]]
    assert 0.55 < len(wrong) / len(train) < 0.65
    for record in train:
        number = record["prompt"].removesuffix("=")
        assert len(number) == 5
        assert record["answer"] == record["chosen"] == number[::-1] != record["rejected"] == number
        assert record["completion"] in (number, number[::-1])


def test_corrupted_answers_differ_in_one_digit() -> None:
    for record in ReverseDigits(num_examples=200, rejected="corrupted").records():
        assert sum(a != b for a, b in zip(record["chosen"], record["rejected"], strict=True)) == 1
    with pytest.raises(ConfigurationError, match="wrong_share"):
        ReverseDigits(wrong_share=1.5)
    with pytest.raises(ConfigurationError, match="num_digits=1"):
        ReverseDigits(num_digits=1)
