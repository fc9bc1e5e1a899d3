"""Reasoning before the answer: phases, budgets, and the curve of accuracy against tokens."""

import dataclasses
import json

import pytest
from evaluation_stand_ins import model as small_model

from lightning_lm.errors import ConfigurationError
from lightning_lm.evals import (
    Arithmetic,
    BudgetForcing,
    ChainOfThought,
    Completions,
    LocalModel,
    Results,
    ServerModel,
    by_name,
    compute_curve,
    evaluate_tasks,
    save_curve,
)
from lightning_lm.tokenizers import ByteTokenizer


class Thinker:
    """Reasons in short pieces, and is right if it was told to wait often enough; one token a letter."""

    description = {"model": "thinker"}  # noqa: RUF012

    def __init__(self, waits_needed=0, thought=" hm"):
        self.waits_needed, self.thought, self.asked = waits_needed, thought, []

    def generate(self, requests):
        self.asked.append(list(requests))
        return [self._completions(request) for request in requests]

    def _completions(self, request):
        prompt = request.prompt
        text = self.thought
        if not prompt.begun or prompt.begun.endswith("the answer is"):
            left, operation, right, _ = prompt.question.split()
            combine = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operation]
            is_known = prompt.begun.count("Wait") >= self.waits_needed
            text = f" {combine(int(left), int(right))}" if is_known else " nothing"
        text = text[: request.max_new_tokens]
        return Completions((text,) * request.num_samples, (len(text),) * request.num_samples)


def arithmetic(**settings):
    return Arithmetic(num_items=6, **settings)


def test_the_answer_comes_after_the_reasoning_and_alone_is_checked():
    thinker = Thinker()
    task = arithmetic(reasoning=ChainOfThought(max_tokens=20))
    results = evaluate_tasks([task], thinker)["arithmetic"]
    assert results.main.value == 1
    reasoning, answers = thinker.asked
    assert all(request.prompt.text.endswith("= Let's think step by step.") for request in reasoning)
    assert (reasoning[0].max_new_tokens, reasoning[0].stop) == (20, ("</think>",))
    assert answers[0].prompt.begun == " Let's think step by step. hm\nTherefore, the answer is"
    assert (answers[0].max_new_tokens, answers[0].stop) == (12, ("\n",))
    assert results.scores["tokens"].value == pytest.approx(
        len(" hm") + sum(len(f" {item.gold}") for item in task.items()) / 6
    )
    assert evaluate_tasks([arithmetic()], Thinker(waits_needed=9))["arithmetic"].main.value == 0


def test_a_budget_cuts_reasoning_and_lengthens_it():
    endless = Thinker(thought=" hm" * 100)
    evaluate_tasks([arithmetic(reasoning=BudgetForcing(max_tokens=5, waits=3))], endless)
    assert [len(asked) for asked in endless.asked] == [6, 6], "a spent budget is not lengthened"
    assert endless.asked[1][0].prompt.begun.partition(".")[2] == " hm h\nTherefore, the answer is"
    for waits in (0, 2):
        thinker = Thinker(waits_needed=2)
        task = arithmetic(reasoning=BudgetForcing(max_tokens=50, waits=waits))
        assert evaluate_tasks([task], thinker)["arithmetic"].main.value == float(waits == 2)
        assert len(thinker.asked) == 2 + waits
    assert [asked[0].max_new_tokens for asked in thinker.asked] == [50, 47, 44, 12]
    assert thinker.asked[2][0].prompt.begun.endswith(" hm\nWait, hm\nWait,")


def test_samples_reason_by_themselves_and_depend_on_the_item_alone():
    lm = LocalModel(small_model(context_length=512), ByteTokenizer(), batch_size=8)
    how = ChainOfThought(max_tokens=4, cue="", answer="=")
    task = arithmetic(num_samples=3, reasoning=how, max_new_tokens=3)
    whole = evaluate_tasks([task], lm)["arithmetic"]
    assert whole.items[3:4] == evaluate_tasks([task], lm, limit=2)["arithmetic"].items[1:]
    assert 6 <= whole.scores["tokens"].value <= 7
    assert {"exact_match_maj@3", "exact_match_pass@2"} <= whole.scores.keys()


def test_gsm8k_is_checked_in_the_form_that_it_asks_for(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "Two and three?", "answer": "2 + 3 = 5\n#### 5"}))
    task = by_name("gsm8k", data=tmp_path, shots=0, chain_of_thought=True)
    (item,) = task.items()
    assert item.requests[0].reasoning.answer == "\n####"
    scores = task.score(item, [Completions(("It is 4, no: 5.\n#### 5",), (9,))])
    assert (scores["strict_match"], scores["flexible_extract"]) == (1, 1)
    with pytest.raises(ConfigurationError, match="has no reasoning"):
        by_name("docs_choice", chain_of_thought=True)


def test_a_chat_server_cannot_go_on_with_reasoning():
    chat = ServerModel("http://localhost:1/v1", "m", chat=True)
    (item, *_) = arithmetic(reasoning=ChainOfThought()).items()
    with pytest.raises(ConfigurationError, match="cannot go on with reasoning"):
        chat.generate([dataclasses.replace(item.requests[0], reasoning=None)])


def test_the_curve_has_a_point_for_each_number_of_samples_and_each_budget(tmp_path):
    tasks = [
        arithmetic(name=f"arithmetic@{budget}", reasoning=BudgetForcing(max_tokens=budget, waits=1))
        for budget in (2, 13)
    ]
    results = evaluate_tasks([*tasks, arithmetic(name="sampled", num_samples=4)], Thinker(1, " hm hm"))
    points = {}
    for point in compute_curve(results.tasks):
        points.setdefault(point.line, []).append((point.tokens, point.score.value))
    assert [value for _, value in points["arithmetic, exact_match"]] == [0, 1]
    tokens = results["sampled"].scores["tokens"].value
    assert [price for price, _ in points["sampled, exact_match_maj"]] == [tokens, 2 * tokens, 4 * tokens]
    results.save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(content["curve"]) == sum(map(len, points.values()))
    assert repr(Results.load(tmp_path / "a.json").tasks) == repr(results.tasks)
    assert save_curve(results, tmp_path / "curve.png").stat().st_size > 5000
