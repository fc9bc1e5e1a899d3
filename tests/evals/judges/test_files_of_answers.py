"""Files of answers, questions and labels, in the published forms, and what is wrong with them."""

import json

import pytest

from lightning_lm.errors import DataError
from lightning_lm.evals.judges import load_answers, load_labels, load_questions, save_answers
from lightning_lm.evals.judges.exchanges import matched


def written(path, records, *, as_list=False):
    path.write_text(json.dumps(records) if as_list else "\n".join(map(json.dumps, records)))
    return path


def test_alpaca_eval_and_our_own_forms(tmp_path):
    published = [
        {"dataset": "helpful_base", "instruction": "Name a bird.", "output": "Wren.", "generator": "gpt4"},
        {"dataset": "vicuna", "instruction": "Sum", "input": "1, 2", "output": "", "generator": "gpt4"},
    ]
    found = load_answers(written(tmp_path / "outputs.json", published, as_list=True))
    assert found.model == "gpt4"
    assert [one.question.turns for one in found.exchanges.values()] == [("Name a bird.",), ("Sum\n\n1, 2",)]
    assert [one.question.category for one in found.exchanges.values()] == ["helpful_base", "vicuna"]
    own = [
        {"prompt": "Name a bird.", "completion": "Tit."},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Sum"}], "answer": "3"},
        {"turns": ["Hi", "Again"], "outputs": ["a", "b"], "id": 7, "reference": ["r", "s"]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"prompt": [{"role": "user", "content": "P"}], "response": "R"},
    ]
    mine = load_answers(written(tmp_path / "mine.jsonl", own))
    assert mine.model == "mine"
    assert [one.answers for one in mine.exchanges.values()] == [("Tit.",), ("3",), ("a", "b"), ("A",), ("R",)]
    assert mine.exchanges["Sum"].question.system == "Be kind."
    assert mine.exchanges["7"].question.reference == ("r", "s")
    assert matched([found, mine]) == ["Name a bird."]
    save_answers(mine, tmp_path / "again.jsonl")
    assert load_answers(tmp_path / "again.jsonl") == mine


def test_mt_bench_has_questions_in_a_file_of_their_own(tmp_path):
    asked = [{"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."], "reference": ["x", "y"]}]
    said = [
        {"question_id": 81, "model_id": "vicuna", "choices": [{"index": 0, "turns": ["One", "Two"]}], "tstamp": 1.0}
    ]
    answers = written(tmp_path / "vicuna.jsonl", said)
    questions = load_questions(written(tmp_path / "question.jsonl", asked))
    found = load_answers(answers, questions)
    assert found.model == "vicuna"
    assert found.exchanges["81"].question == questions["81"]
    assert found.exchanges["81"].answers == ("One", "Two")
    with pytest.raises(DataError, match=r"vicuna.jsonl, line 1: no question has the id 81.*--questions question.jsonl"):
        load_answers(answers)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"output": "a"}, r"line 2 has no prompt.*instruction.*it has 'output'"),
        ({"prompt": "a"}, r"line 2 has no answer.*output.*it has 'prompt'"),
        ({"prompt": "a", "output": 3}, "line 2, field 'output': expected a text"),
        ({"prompt": 3, "output": "a"}, "line 2, field 'prompt': expected a text"),
        ({"turns": ["a", "b"], "output": "x"}, r"line 2 has 1 answer\(s\) to the 2 turn"),
        ({"prompt": "a", "choices": []}, "line 2, field 'choices': expected"),
        ({"id": "ok", "prompt": "a", "output": "x"}, "line 2 repeats 'ok'"),
        ({"prompt": "a", "output": "x", "model": "other"}, "of the model 'file', .*line 2 of 'other'"),
        ({"prompt": "a", "output": "x", "reference": 3}, "line 2, field 'reference'"),
        ([1], "line 2: expected a JSON object"),
    ],
)
def test_a_record_that_does_not_fit_is_named(tmp_path, record, message):
    path = written(tmp_path / "file.jsonl", [{"prompt": "ok", "output": "fine"}, record])
    with pytest.raises(DataError, match=rf"(?s){message}"):
        load_answers(path)


def test_models_must_have_answered_the_same(tmp_path):
    one = load_answers(
        written(tmp_path / "one.jsonl", [{"id": n, "prompt": f"P{n}", "output": "x"} for n in range(10)])
    )
    other = load_answers(
        written(tmp_path / "two.jsonl", [{"id": n, "prompt": f"P{n}", "output": "x"} for n in range(4, 12)])
    )
    assert matched([one, other]) == ["4", "5", "6", "7", "8", "9"]
    assert matched([one, other], 3) == ["4", "6", "8"]
    strange = load_answers(written(tmp_path / "three.jsonl", [{"id": 4, "prompt": "Q", "output": "x"}]))
    twice = load_answers(written(tmp_path / "twice.jsonl", [{"prompt": "P", "output": text} for text in "xyz"]))
    assert list(twice.exchanges) == ["P", "P (2)", "P (3)"]
    with pytest.raises(DataError, match="another text in three"):
        matched([one, strange])
    with pytest.raises(DataError, match="No prompt was answered by all of 2 models"):
        matched([one, load_answers(written(tmp_path / "four.jsonl", [{"prompt": "Q", "output": "x"}]))])


def test_labels_of_people(tmp_path):
    alpaca = [
        {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": value, "annotator": n}
        for n, value in enumerate((1, 2.0, 0, 1.5))
    ]
    (pair,) = load_labels(written(tmp_path / "human.json", alpaca, as_list=True))
    assert (pair.first.answers, pair.second.answers) == (("a",), ("b",))
    assert pair.labels == ("first", "second", "tie", "tie")
    turns = [{"role": role, "content": f"{role}{n}"} for n in (1, 2) for role in ("user", "assistant")]
    other = [
        turn | {"content": turn["content"].upper() if turn["role"] == "assistant" else turn["content"]}
        for turn in turns
    ]
    bench = [
        {"question_id": 81, "model_a": "x", "model_b": "y", "winner": winner, "turn": turn, "conversation_a": turns,
         "conversation_b": other} for winner, turn in (("model_b", 1), ("tie (inconsistent)", 2), ("x", 2))
    ]  # fmt: skip
    first, second = load_labels(written(tmp_path / "bench.jsonl", bench))
    assert (first.first.answers, first.second.answers, first.labels) == (("assistant1",), ("ASSISTANT1",), ("second",))
    assert second.labels == ("tie", "first")
    (chosen,) = load_labels(written(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    assert chosen.labels == ("first",)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "output_1": "a"}, "line 1 has no two answers"),
        ({"output_1": "a", "output_2": "b"}, "line 1 has no prompt"),
        ({"prompt": "q", "output_1": "a", "output_2": "b"}, "line 1 has no label"),
        ({"prompt": "q", "output_1": "a", "output_2": "b", "winner": "both"}, "field 'winner': 'both' is none of"),
        ({"prompt": "q", "output_1": "a", "output_2": 3, "winner": "a"}, "field 'output_2': expected"),
        ({"conversation_a": [], "conversation_b": [], "winner": "a"}, "field 'conversation_a': expected"),
    ],
)
def test_a_label_that_does_not_fit_is_named(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        load_labels(written(tmp_path / "labels.jsonl", [record]))
