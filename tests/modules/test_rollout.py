"""Answers with their rewards: rows for training, log-probabilities, groups that teach nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from lightning_lm.data.post_training.prompts import take_prompts
from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Completion, Sampling
from lightning_lm.modules import RolloutPlan, Validation, token_scores
from lightning_lm.modules.rl.rollout import Rollout, RolloutEngine
from lightning_lm.rewards import RewardError, Scoring
from lightning_lm.types import IGNORE_INDEX


def prompts_of(numbers, digits):
    return {
        "prompt_ids": [np.array(digits.encode(f"{number}=")) for number in numbers],
        "prompts": [f"{number}=" for number in numbers],
        "texts": [f"{number}=" for number in numbers],
        "columns": {"answer": [str(number)[::-1] for number in numbers]},
        "stop_ids": (digits.eos_id,),
        "counted": [True] * len(numbers),
    }


@pytest.fixture
def trainer(make_trainer, policy):
    trainer = make_trainer()
    trainer.strategy.connect(policy())
    trainer.strategy._lightning_module = torch.nn.Module()
    return trainer


def length_of(*, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def written(totals, samples, *, ends=("eos",)):
    """Answers of known ids: the first has the prompt (1, 2) and the tokens 3, 4; each further one a token more."""
    answers = [
        Completion((1, 2), tuple(range(3, 5 + row)), "", ends[row % len(ends)], tuple(-0.1 * t for t in range(2 + row)))
        for row in range(len(totals))
    ]
    totals = np.array(totals, dtype=float)
    prompts = {"prompt_ids": [], "prompts": [], "texts": [], "columns": {}, "stop_ids": (), "counted": []}
    return Rollout(prompts, samples, answers, totals[:, None], totals, ("r",))


def test_rows_are_padded_right_and_learn_the_answer_alone():
    rows = written([1.0, 0.0], 2).rows(mask_truncated=True, device=torch.device("cpu"))
    assert rows["input_ids"].tolist() == [[1, 2, 3, 4, 0], [1, 2, 3, 4, 5]]
    ignored = IGNORE_INDEX
    assert rows["labels"].tolist() == [[ignored, ignored, 3, 4, ignored], [ignored, ignored, 3, 4, 5]]


def test_nothing_is_learned_without_a_reward_or_from_an_answer_that_was_cut():
    rollout = written([1.0, np.nan, 0.0, 1.0], 2, ends=("eos", "eos", "length", "length"))
    device = torch.device("cpu")
    learned = [(rollout.rows(mask_truncated=m, device=device)["labels"] >= 0).any(1).tolist() for m in (False, True)]
    assert learned == [[True, False, True, True], [True, False, False, False]]


def test_groups_are_dull_by_equality():
    nan = np.nan
    rollout = written([0.7, 0.7, 0.7, 0.1, 1, 0, 1, nan, 0.7, nan, nan, nan], 2)
    assert rollout.zero_variance_groups == [0, 3, 4, 5]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_generator_and_the_training_graph_agree(policy, digits, trainer, temperature):
    model = policy()
    with torch.no_grad():
        model.head.weight.mul_(20)  # an untrained policy is nearly uniform, whatever the temperature
    plan = RolloutPlan(samples_per_prompt=8, max_new_tokens=5, sampling=Sampling(temperature=temperature))
    engine = RolloutEngine(model, digits, [length_of], plan, trainer)
    rollout = engine.rollout(prompts_of((123, 4567, 89), digits), (1, 2))
    rows = rollout.rows(mask_truncated=False, device=torch.device("cpu"))
    ours = token_scores(model.eval(), rows, temperature=temperature).logprobs.detach()
    assert (ours != 0).sum() == sum(len(answer.token_ids) for answer in rollout.completions)
    torch.testing.assert_close(rollout.sampler_logprobs(ours), ours, rtol=0, atol=1e-4)


def test_a_moment_decides_the_noise(policy, digits, trainer):
    plan = RolloutPlan(samples_per_prompt=4, max_new_tokens=5)
    engine = RolloutEngine(policy(), digits, [length_of], plan, trainer)
    prompts = prompts_of((123, 456), digits)
    first, again, other = (engine.rollout(prompts, (0, step)) for step in (7, 7, 8))
    assert first.completions == again.completions
    assert first.completions != other.completions


class Scripted(RolloutEngine):
    """Says what each call of `answer` earns in place of asking a model."""

    script = ()

    def complete(self, prompts, samples, sampling):
        totals = self.script[len(self.asked)]
        self.asked.append(prompts["prompts"])
        assert len(totals) == samples * len(prompts["prompts"])
        return dataclasses.replace(written(totals, samples), prompts=prompts)


@pytest.fixture
def scripted(policy, digits, trainer):
    def make(*script, **settings):
        plan = RolloutPlan(samples_per_prompt=2, **settings)
        engine = Scripted(policy(), digits, [length_of], plan, trainer)
        engine.script, engine.asked = script, []
        return engine

    return make


def test_dull_groups_are_replaced_within_the_budget(scripted, digits):
    engine = scripted([0, 0, 1, 0, 1, 1], [1, 1, 0, 1], [2, 0], resample_rounds=2)
    rollout = engine.rollout(prompts_of((11, 22, 33), digits), (0,))
    assert engine.asked == [["11=", "22=", "33="], ["11=", "33="], ["33="]]
    # The second round made the first group's place good with what prompt 33 gave, the third the last group's.
    assert rollout.groups.tolist() == [[0, 1], [1, 0], [2, 0]]
    assert rollout.prompts["prompts"] == ["33=", "22=", "33="]
    assert rollout.resampled == 2


def test_new_prompts_come_from_the_spare_ones(scripted, digits):
    engine = scripted([0, 0, 1, 0], [0, 1], resample_rounds=3)
    spare = prompts_of((77, 88), digits)
    rollout = engine.rollout(prompts_of((11, 22), digits), (0,), lambda number, count: take_prompts(spare, [number]))
    assert rollout.prompts["prompts"] == ["88=", "22="]
    assert rollout.prompts["columns"] == {"answer": ["88", "22"]}
    assert len(engine.asked) == 2


def test_a_budget_that_runs_out_leaves_dull_groups(scripted, digits):
    engine = scripted([0, 0], [1, 1], resample_rounds=1)
    assert engine.rollout(prompts_of((11,), digits), (0,)).groups.tolist() == [[0, 0]]


def test_a_reward_that_fails_on_some_completions_is_reported_and_masked(policy, digits, trainer):
    def fails_on_others(*, prompts, **columns):
        if prompts != ["12="]:
            raise ValueError("not 12")
        return [1.0]

    plan = RolloutPlan(samples_per_prompt=1, max_new_tokens=3)
    engine = RolloutEngine(policy(), digits, [fails_on_others], plan, trainer)
    with pytest.warns(UserWarning, match=r"failed on sample 1: ValueError: not 12"):
        rollout = engine.rollout(prompts_of((12, 34), digits), (0,))
    labels = rollout.rows(mask_truncated=False, device=torch.device("cpu"))["labels"]
    assert (labels >= 0).any(1).tolist() == [True, False]


@pytest.mark.parametrize("reward", [lambda completions, solution: [0.0], lambda completions, **c: [None, None]])
def test_a_rollout_without_any_reward_ends_the_run(policy, digits, trainer, reward):
    plan = RolloutPlan(samples_per_prompt=2, max_new_tokens=3)
    engine = RolloutEngine(policy(), digits, [reward], plan, trainer)
    with pytest.raises((RewardError, ConfigurationError), match=r"columns \['answer'\]"):
        engine.rollout(prompts_of((12,), digits), (0,))


def test_a_reward_that_fails_on_every_completion_ends_the_run(policy, digits, trainer):
    def broken(*, completions, **columns):
        raise ValueError("the judge is ill")

    plan = RolloutPlan(samples_per_prompt=2, max_new_tokens=3)
    prompts = prompts_of((12,), digits)
    with (
        pytest.warns(UserWarning, match="1 more"),
        pytest.raises(RewardError, match=r"All 2 completions.*'broken' failed on sample 0: ValueError: the judge"),
    ):
        RolloutEngine(policy(), digits, [broken], plan, trainer).rollout(prompts, (0,))
    plan = dataclasses.replace(plan, scoring=Scoring(stop_on_failure=True))
    with pytest.raises(RewardError, match="the judge is ill"):
        RolloutEngine(policy(), digits, [broken], plan, trainer).rollout(prompts, (0,))


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.9), Sampling(temperature=0.0), Sampling(top_k=5)])
def test_a_sampling_that_is_not_the_policy_is_refused(sampling):
    with pytest.raises(ConfigurationError, match="temperature"):
        RolloutPlan(sampling=sampling)


def test_a_validation_that_means_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="samples=1"):
        Validation(pass_at=(1, 4))
    with pytest.raises(ConfigurationError, match="greedy"):
        Validation(samples=4)
