"""Judges that are fair, biased, unclear, broken and gone, each a real server process."""

import math

import pytest

from lightning_lm.errors import ConfigurationError
from lightning_lm.json_http import JSONServer
from lightning_lm.parts import Part
from lightning_lm.rewards import Comparison, Grade, LLMJudge, Scoring, score

PAIR = {"prompts": ["Why?"], "completions": ["a good one"], "reference": ["a bad one"]}


def said(text, finish="stop"):
    return {"json": {"choices": [{"message": {"content": text}, "finish_reason": finish}]}}


@pytest.fixture
def judge(serve):
    def make(*steps, timeout_s=20.0, **settings):
        scenario = serve(*steps)
        server = JSONServer(url=f"{scenario.url}/v1", backoff_s=0.0, timeout_s=timeout_s, retries=1)
        return LLMJudge(server=server, model="judge", **settings), scenario

    return make


def test_a_fair_judge_is_asked_in_both_orders(judge):
    fair, scenario = judge({"status": 500}, {"prefer": "good"})
    columns = {"prompts": ["Why?"] * 3, "completions": ["good {x}", "bad", "good"], "reference": ["bad", "good", None]}
    assert fair(**columns) == [1.0, 0.0, None]
    messages = [request["body"]["messages"][0]["content"] for request in scenario.requests]
    assert len(messages) == 5  # two pairs in two orders, and one attempt that failed
    assert len(set(messages)) == 4
    assert all(request["path"].endswith("/v1/chat/completions") for request in scenario.requests)
    assert {request["body"]["temperature"] for request in scenario.requests} == {0.0}


@pytest.mark.parametrize("verdict", ["Verdict: A", "Verdict: B", "Verdict: tie"])
def test_a_judge_that_favours_a_place_says_nothing(judge, verdict):
    assert judge(said(f"Because.\n{verdict} \n"))[0](**PAIR) == [0.5]


@pytest.mark.parametrize(
    "reply",
    ["", "A", "Verdict: C", "Verdict: A or B", "Verdict: A\nOr not.", "I say Verdict: A", "verdict: A", "Verdict A"],
)
def test_an_unclear_verdict_gives_no_reward(judge, reply):
    assert judge(said(reply))[0](**PAIR) == [None]
    assert judge(said("Verdict: A"), said(reply))[0](**PAIR) == [None]


def test_a_reply_that_was_cut_has_no_verdict(judge):
    assert judge(said("Verdict: A", finish="length"))[0](**PAIR) == [None]


@pytest.mark.parametrize(("reply", "value"), [("1", 0.0), ("10", 1.0), ("4", 1 / 3), ("11", None), ("7.5", None)])
def test_grades(judge, reply, value):
    grading, _ = judge(said(f"Well.\nVerdict: {reply}"), question=Grade())
    (found,) = grading(prompts=["p"], completions=["c"])
    assert found == value or found == pytest.approx(value)


def test_a_grade_may_be_given_the_reference(judge):
    question = Grade(template="{prompt}|{completion}|{reference}", lowest=0, highest=1)
    grading, scenario = judge(said("Verdict: 1"), question=question, column="answer")
    assert grading(prompts=["p", "q"], completions=["c", "d"], answer=["r", None]) == [1.0, None]
    assert [request["body"]["messages"][0]["content"] for request in scenario.requests] == ["p|c|r"]


@pytest.mark.parametrize("step", [{"raw": "{"}, {"status": 400}, {"json": {"choices": []}}, {"json": {"choices": [1]}}])
def test_a_broken_answer_fails_its_sample_only(judge, step):
    grading, _ = judge(step, said("Verdict: 10"), question=Grade(), workers=1)
    with pytest.warns(UserWarning, match="judge"):
        table = score([grading], [1.0], prompts=["p"] * 3, completions=["a", "b", "c"])
    assert table.values[1:, 0].tolist() == [1.0, 1.0]
    assert [failure.sample for failure in table.failures] == [0]


def test_a_judge_that_is_gone_is_not_asked_again(judge):
    grading, scenario = judge({"hang": True}, question=Grade(), workers=2, timeout_s=0.2)
    with pytest.warns(UserWarning, match="timeout_s"):
        table = score([grading], [1.0], prompts=["p"] * 50, completions=["a"] * 50, scoring=Scoring(timeout_s=30.0))
    assert len(table.failures) == 50
    assert math.isnan(table.totals[0])
    assert len(scenario.requests) <= 4


@pytest.mark.parametrize(
    "template", ["{prompt}", "{prompt} {first} {second} {x}", "{prompt} {first} {second", "{prompt.x} {first} {second}"]
)
def test_a_template_that_cannot_be_filled_is_refused(template):
    with pytest.raises(ConfigurationError, match="template"):
        Comparison(template=template)


def test_it_travels_as_plain_data():
    judge = LLMJudge(server=JSONServer(url="http://host/v1"), model="m", question=Grade(highest=5))
    assert Part.from_dict(judge.to_dict()) == judge


@pytest.mark.parametrize(
    "make",
    [lambda: Grade(lowest=3, highest=3), lambda: LLMJudge(server=JSONServer(url="http://h"), model="m", workers=0)],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()
