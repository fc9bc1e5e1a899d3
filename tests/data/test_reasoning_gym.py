"""Questions of Reasoning Gym: its own entries, none twice, held-out ones never among the others."""

import collections
import re

import gym_library  # noqa: F401 - finds Reasoning Gym, or a stand-in
import numpy as np
import pytest
import reasoning_gym
from reasoning_gym.factory import create_curriculum

from lightning_lm.data import Plain, ReasoningGym
from lightning_lm.data.post_training.prompts import PromptStream
from lightning_lm.errors import ConfigurationError, DataError, MissingDependencyError
from lightning_lm.parts import Part
from lightning_lm.rewards import ReasoningGymAnswer
from lightning_lm.tokenizers import ByteTokenizer

EASY = {"max_terms": 2, "max_digits": 2}


def questions(**settings) -> list[str]:
    return [record["question"] for record in ReasoningGym(**settings).records()]


def test_records_are_the_entries_that_their_fields_describe():
    records = list(ReasoningGym("chain_sum", size=300, config=EASY, seed=5).records())
    assert len(records) == 300
    for record in records:
        entry = reasoning_gym.create_dataset(record["task"], **record["config"])[record["index"]]
        assert (record["question"], record["answer"]) == (entry["question"], entry["answer"])
        assert record["prompt"] == record["question"]
        assert record["config"]["max_digits"] == 2


def test_no_question_comes_twice_and_the_same_ones_come_again():
    asked = questions(task="gcd", size=700, seed=1)
    assert len(set(asked)) == 700
    assert asked == questions(task="gcd", size=700, seed=1)
    assert asked[:50] == questions(task="gcd", size=50, seed=1)  # more questions change none of the first
    # The library seeds a question with seed + index, so that its seeds 1 and 2 have 499 of 500 questions in common.
    assert len(set(asked[:100]) & set(questions(task="gcd", size=100, seed=2))) < 5


def test_held_out_questions_are_in_no_training_set_whatever_the_seed_and_the_settings():
    held_out = {*questions(task="chain_sum", size=100, config=EASY, held_out=True)}
    for settings in ({"seed": 0}, {"seed": 7}, {"config": {"max_terms": 2, "max_digits": 1}, "size": 20}):
        trained = questions(**{"task": "chain_sum", "size": 500, "config": EASY, **settings})
        assert not held_out & {*trained}
    sides = [len(list(ReasoningGym("coin_flip", size=n, held_out=n < 3).records())) for n in (2, 20)]
    assert sides == [2, 20]


def test_several_tasks_have_their_weights_at_every_point():
    source = ReasoningGym({"chain_sum": 3, "gcd": 1}, size=120, config={"chain_sum": EASY})
    tasks = [record["task"] for record in source.records()]
    for end in range(4, 121, 4):
        assert collections.Counter(tasks[:end]) == {"chain_sum": end * 3 // 4, "gcd": end // 4}


def test_levels_are_those_of_the_tasks_own_curriculum_and_settings_come_before_them():
    curriculum = create_curriculum("chain_sum")
    curriculum.set_global_level(3)
    wanted = curriculum.generate_configuration({"seed": 0, "size": 1})
    records = list(ReasoningGym("chain_sum", size=200, level=3, config={"min_terms": 3}).records())
    assert {record["config"]["max_digits"] for record in records} == {wanted.max_digits}
    terms = [len(re.findall(r"\d+", record["question"])) for record in records]
    assert min(terms) == 3
    assert max(terms) == wanted.max_terms


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"task": "chain_sums"}, ConfigurationError, "no task 'chain_sums'. Did you mean chain_sum"),
        ({"task": "qqqq"}, ConfigurationError, "The tasks are: .*chain_sum"),
        ({"task": "composite"}, ConfigurationError, "no task 'composite'"),
        ({"task": "chain_sum", "config": {"terms": 3}}, ConfigurationError, "'terms'. Its settings are: .*max_terms"),
        ({"task": "chain_sum", "config": {"seed": 3}}, ConfigurationError, "no setting 'seed'"),
        ({"task": "chain_sum", "config": {"min_terms": 9}}, ConfigurationError, "refuses .*max_terms must be >="),
        ({"task": "chain_sum", "config": {"max_terms": "many"}}, ConfigurationError, "chain_sum refuses"),
        ({"task": "chain_sum", "level": 99}, ConfigurationError, "highest level of chain_sum, 10"),
        ({"task": "acre", "level": 0}, ConfigurationError, "acre has no levels"),
        ({"task": {"gcd": 1}, "config": {"max_terms": 3}}, ConfigurationError, "none of the tasks"),
        ({"task": {"gcd": 0}}, ConfigurationError, "positive"),
        ({"task": {}}, ConfigurationError, "positive"),
        ({"task": "gcd", "size": 0}, ConfigurationError, "size=0"),
        ({"task": "gcd", "level": -1}, ConfigurationError, "level=-1"),
        ({"task": "coin_flip", "size": 5000}, DataError, "different questions to train on .*Lower size"),
        ({"task": "coin_flip", "size": 5000, "held_out": True}, DataError, "different held-out questions"),
    ],
)
def test_errors_name_the_remedy(settings, error, message):
    with pytest.raises(error, match=message):
        list(ReasoningGym(**settings).records())


def test_tasks_whose_questions_change_with_the_hash_seed_need_one(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigurationError, match="PYTHONHASHSEED=0 lightning-lm"):
        list(ReasoningGym("word_ladder", size=1).records())
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(list(ReasoningGym("word_ladder", size=1).records())) == 1


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .lightning-lm\[gym\]"):
        list(ReasoningGym("gcd").records())


def test_settings_of_an_enumeration_are_written_by_name():
    for record in ReasoningGym(
        "aiw", size=5, config={"task_types": ["siblings"], "task_type_weights": [1.0]}
    ).records():
        assert record["config"]["task_types"] == ["siblings"]
        assert "sisters" in record["question"]
        assert ReasoningGymAnswer(sandbox=None)(
            prompts=[""], completions=[record["answer"]], **{name: [value] for name, value in record.items()}
        ) == [1.0]


def test_as_prompts_the_fields_are_columns_for_the_rewards():
    source = ReasoningGym("gcd", size=20)
    assert Part.from_dict(source.to_dict()) == source
    stream = PromptStream(source, ByteTokenizer(), Plain(), shuffle=False)
    batch = stream.batch(np.arange(20))
    assert batch["prompts"] == questions(task="gcd", size=20)
    assert set(batch["columns"]) == {"question", "answer", "task", "config", "index"}
    assert stream.fingerprint == PromptStream(source, ByteTokenizer(), Plain(), shuffle=False).fingerprint
