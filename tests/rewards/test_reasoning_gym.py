"""Scores by the verifiers of Reasoning Gym: its own, on questions made again, in a process that hostile answers end."""

import json

import gym_library  # noqa: F401 - finds Reasoning Gym, or a stand-in
import pytest
import reasoning_gym

from lightning_lm.data import ReasoningGym
from lightning_lm.errors import DataError, LightningLMError, MissingDependencyError
from lightning_lm.gym import score_answer
from lightning_lm.parts import Part
from lightning_lm.rewards import AnswerTags, LastNumber, ReasoningGymAnswer, Sandbox, score
from lightning_lm.rewards import reasoning_gym as module

HERE = ReasoningGymAnswer(sandbox=None)
TASKS = {"chain_sum": 2, "gcd": 1, "prime_factorization": 1, "n_queens": 1}


def columns_of(records):
    return {name: [record[name] for record in records] for name in records[0] if name != "prompt"}


def scored(reward, records, completions):
    prompts = [record["prompt"] for record in records]
    return reward(prompts=prompts, completions=completions, **columns_of(records))


@pytest.fixture(scope="module")
def records():
    return list(ReasoningGym(TASKS, size=20).records())


def test_scores_are_the_verifiers_own_in_the_sandbox_and_out_of_it(records):
    for change in (str, lambda answer: f"It is {answer}", lambda answer: answer[:-1] + "7", lambda answer: "1 2 3"):
        answers = [change(record["answer"]) for record in records]
        wanted = []
        for record, answer in zip(records, answers, strict=True):
            dataset = reasoning_gym.create_dataset(record["task"], **record["config"])
            try:
                wanted.append(dataset.score_answer(answer, dataset[record["index"]]))
            except ValueError:  # how prime_factorization says that an answer is no product
                wanted.append(0.0)
        assert scored(HERE, records, answers) == wanted
        assert scored(ReasoningGymAnswer(), records, answers) == wanted
        whole = scored(ReasoningGymAnswer(sandbox=None, partial_credit=False), records, answers)
        assert whole == [float(value >= 1) for value in wanted]
    assert scored(HERE, records, [record["answer"] for record in records]) == [1.0] * 20


def test_records_that_were_written_to_a_file_are_scored_alike(records):
    read = [json.loads(json.dumps(record)) for record in records]
    assert scored(HERE, read, [record["answer"] for record in records]) == [1.0] * 20


@pytest.mark.parametrize(
    "form", ["{}", "  {}\n", "I think <answer>1</answer>, no: <answer> {} </answer>", r"\boxed{{{}}}", "so\n#### {}"]
)
def test_the_final_answer_is_found_in_every_usual_form(records, form):
    some = [record for record in records if record["task"] == "chain_sum"][:3]
    assert scored(HERE, some, [form.format(record["answer"]) for record in some]) == [1.0] * 3


def test_extractors_decide_and_no_answer_scores_nothing(records):
    some = [record for record in records if record["task"] == "gcd"][:1]
    right = some[0]["answer"]
    assert scored(ReasoningGymAnswer(extractors=(LastNumber(),), sandbox=None), some, [f"It is {right}."]) == [1.0]
    assert scored(ReasoningGymAnswer(extractors=(AnswerTags(),), sandbox=None), some, [right]) == [0.0]
    assert AnswerTags()("<answer>1") is AnswerTags()("1</answer>") is AnswerTags()("</answer>1<answer>") is None
    assert AnswerTags(tag="a")("<a>\n2</a><a>3") == "2"


def test_hostile_answers_reach_nothing_and_the_next_answer_is_scored(records, tmp_path):
    """The verifier of n_queens evaluates the answer as Python."""
    queens = [record for record in records if record["task"] == "n_queens"][:1]
    reward = ReasoningGymAnswer(sandbox=Sandbox(time_s=1.0, memory_mb=4096))
    hostile = [f"[open({str(tmp_path / 'file')!r}, 'w')]", "print('1.0')", "[1] * 10**12", "[9**9**9**9]"]
    assert scored(reward, queens * 4, hostile) == [0.0] * 4
    assert not list(tmp_path.iterdir())
    assert scored(reward, queens, [queens[0]["answer"]]) == [1.0]


def test_a_question_that_is_not_the_records_is_refused(records):
    other = [{**records[0], "question": "Another?"}]
    with pytest.raises(DataError, match=r"another version of Reasoning Gym.*PYTHONHASHSEED"):
        scored(HERE, other, ["1"])
    table = score([HERE], [1.0], prompts=["?"], completions=["1"], columns=columns_of(other))
    assert "another version" in table.failures[0].reason


def test_a_verifier_that_fails_on_its_own_answer_is_no_zero(records, monkeypatch):
    class Broken:
        def score_answer(self, answer, entry):
            raise KeyError("metadata")

    entry = {"question": "?", "answer": "1"}
    assert score_answer(Broken(), entry, "2") == "the verifier fails on its own answer: KeyError: 'metadata'"
    monkeypatch.setattr(module.gym, "score_answer", lambda *_: "the verifier fails")
    with pytest.raises(LightningLMError, match=r"index 0 of .*the verifier fails"):
        scored(HERE, records[:1], ["1"])


def test_a_sample_without_a_task_has_no_score():
    columns = {"task": [None], "config": [None], "index": [None], "question": [None]}
    assert HERE(prompts=["?"], completions=["1"], **columns) == [None]
    assert HERE(prompts=["?"], completions=["1"]) == [None]


def test_the_part_is_plain_data_and_a_missing_package_is_named(records, monkeypatch):
    reward = ReasoningGymAnswer(extractors=(AnswerTags(tag="a"),))
    assert Part.from_dict(reward.to_dict()) == reward
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    module._entry.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"lightning-lm\[gym\]"):
        scored(HERE, records[:1], ["1"])
