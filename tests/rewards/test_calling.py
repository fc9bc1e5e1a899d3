"""The forms in which people write rewards: lists or single samples, sync or async, TRL's, builtins, and misfits."""

import asyncio
import functools
import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml

from lightning_lm.cli import main
from lightning_lm.errors import ConfigurationError
from lightning_lm.rewards import check_reward, score

SAMPLES = {"prompts": ["p", "q"], "completions": ["good", "bad"]}
COLUMNS = {"answer": ["good", "good"], "completion_ids": [[1, 2], [3]]}


def protocol(*, prompts, completions, **columns):
    return [float(c == a) for c, a in zip(completions, columns["answer"], strict=True)]


def lists(completions, answer):
    return [c == a for c, a in zip(completions, answer, strict=True)]


def single(completion, answer):
    return completion == answer


def annotated(prompt: str, completion: str, answer: str, weight: float = 1.0) -> float:
    return weight * (completion == answer)


def only_text(text: str) -> float:
    return float(text == "good")


def only_texts(texts):
    return [float(text == "good") for text in texts]


def listed(x: list[str]) -> list[float]:
    return [float(text == "good") for text in x]


def positional(completion, answer, /):
    return float(completion == answer)


async def later(completions, **columns):
    return lists(completions, columns["answer"])


async def later_single(completion, answer):
    return float(completion == answer)


def tensor(completions):
    return torch.tensor([c == "good" for c in completions], dtype=torch.bfloat16, requires_grad=False)


def array(completions):
    return np.array([c == "good" for c in completions])


def zero_dim(completion):
    return torch.tensor(float(completion == "good"))


def generator(completions):
    return (float(c == "good") for c in completions)


def trl_chat(prompts, completions, answer, **kwargs):
    assert prompts[0][0]["role"] == "user"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if content == wanted else 0.0 for content, wanted in zip(contents, answer, strict=True)]


def trl_text(completions, **kwargs):
    return [1.0 if len(ids) == 2 else 0.0 for ids in kwargs["completion_ids"]]


class Callee:
    def __call__(self, completion):
        return float(completion == "good")

    def method(self, completions):
        return [float(c == "good") for c in completions]


@dataclass
class Scaled:
    scale: float = 1.0

    def __call__(self, completions, **columns):
        return [self.scale * (completion == "good") for completion in completions]


FORMS = [
    *(
        protocol,
        lists,
        single,
        annotated,
        only_text,
        only_texts,
        listed,
        positional,
        later,
        later_single,
        tensor,
        array,
    ),
    *(zero_dim, generator, trl_chat, trl_text, Callee(), Callee().method, Scaled()),
    functools.partial(annotated, weight=1.0),
    lambda **columns: [1.0, 0.0],
    lambda completions, **_: np.array([1.0, 0.0], dtype=np.float32),
]


@pytest.mark.parametrize("reward", FORMS, ids=lambda reward: getattr(reward, "__name__", type(reward).__name__))
def test_natural_forms_work(reward):
    check_reward(reward)
    check_reward(reward, COLUMNS)
    table = score([reward], [1.0], **SAMPLES, columns=COLUMNS)
    assert table.failures == ()
    assert table.totals.tolist() == [1.0, 0.0]


def test_a_builtin_of_one_argument_is_given_the_completion():
    assert score([len], [1.0], **SAMPLES).totals.tolist() == [4.0, 3.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, solution: [0.0, 0.0], r"requires 'solution'.*columns \['answer', 'completion_ids'\]"),
        (lambda: 1.0, "takes no argument"),
        (lambda prompts, completion: 1.0, "lists and single samples"),
        (Scaled, re.escape("give an object of it, such as Scaled()")),
        ("lists", "is not a reward; give a function"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_is_offered(reward, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_reward(reward, COLUMNS)
    assert "prompt, completion and the columns of one sample" in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (0.5, "it returned 0.5, and a list"),
        ("good", "it returned 'good', and a list"),
        ({"a": 1.0, "b": 2.0}, "and a list with one number per completion"),
        (None, "it returned None, and a list"),
        ([1.0], "it returned 1 values for 2 samples"),
        (["1.0", "2.0"], "it returned '1.0', and a finite number"),
        ([{"score": 1.0}] * 2, "and a finite number is needed"),
        ([10**400, 1j], "and a finite number is needed"),
        (torch.zeros(2, 2), "it returned [0.0, 0.0], and a finite number"),
    ],
)
def test_what_is_no_list_of_numbers_is_a_failure_that_says_so(returned, reason):
    table = score([lambda completions: returned], [1.0], **SAMPLES)
    assert len(table.failures) == 2
    assert reason in str(table.failures[0])


class Unprintable(BaseException):
    def __str__(self):
        raise self


class Number:
    def __float__(self):
        raise KeyError("no number")

    def __repr__(self):
        sys.exit(2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (asyncio.CancelledError(), "CancelledError: "),
        (BaseException("whatever"), "BaseException: whatever"),
        (Unprintable(), "Unprintable"),
        (Number(), "KeyError: 'no number'"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("limits_itself", [False, True])
def test_whatever_a_reward_raises_is_a_failure_of_its_sample(error, reason, limits_itself):
    def leaves(completion):
        if completion == "bad" and isinstance(error, BaseException):
            raise error
        return error if completion == "bad" else 1.0

    leaves.limits_itself = limits_itself
    table = score([leaves], [1.0], **SAMPLES)
    assert [(failure.sample, failure.reason) for failure in table.failures] == [(1, reason)]
    assert table.totals[0] == 1.0


MODULE = """
class Scaled:
    def __init__(self, scale: float = 1.0):
        self.scale = scale
    def __call__(self, completions, **columns):
        return [self.scale * len(text) for text in completions]

def single(completion: str, answer: str) -> float:
    return float(completion == answer)

def lists(completions, answer, **kwargs):
    return [float(c == a) for c, a in zip(completions, answer)]
"""


def test_own_rewards_are_named_in_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rewards.py").write_text(MODULE)
    tiny = {"class_path": "TransformerConfig", "init_args": {"d_model": 16, "num_layers": 1, "context_length": 32}}
    scaled = {"class_path": "my_rewards.Scaled", "init_args": {"scale": 0.5}}
    rewards = ["my_rewards.single", {"class_path": "my_rewards.lists"}, scaled, {"class_path": "ExactAnswer"}]
    trainer = {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "logger": False}
    config = {
        "base": "grpo/reverse",
        "trainer": {**trainer, "enable_checkpointing": False, "callbacks": []},
        "model": {"init_args": {"model": tiny, "rewards": rewards}},
        "data": {"init_args": {"tokenizer": {"class_path": "TrainCharacters"}}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml"]) == 0
