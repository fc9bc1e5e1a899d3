"""Rollouts cut into the micro-batches of optimizer steps, and checkpoints written within one."""

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.modules import ExperienceLoader, RolloutPlan
from lightning_lm.modules.rl.experience_loader import skip_unfinished_rollout
from lightning_lm.types import IGNORE_INDEX


class Prompts:
    prompts_per_batch = 4

    def __init__(self, count=3):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(range(self.count))


def rows_of(number, spare):
    """Row ``i`` is full of the id ``i`` and learns ``i % 5`` tokens from the third on."""
    ids = torch.arange(24)[:, None].repeat(1, 8)
    labels = ids.clone()
    labels[:, :2] = IGNORE_INDEX
    labels[torch.arange(8) >= 2 + ids % 5] = IGNORE_INDEX
    old = -torch.arange(24 * 7).view(24, 7).float()
    return {
        "input_ids": ids,
        "labels": labels,
        "old_logprobs": old,
        "advantages": torch.arange(24).float(),
        "policy_version": number,
        "tokens_per_row": 2.0,
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_row_comes_once_an_epoch(make_trainer, accumulate):
    plan = RolloutPlan(samples_per_prompt=6, epochs=2, minibatches=3)
    loader = ExperienceLoader(rows_of, Prompts(), plan, make_trainer(accumulate_grad_batches=accumulate))
    batches = list(loader)
    assert len(batches) == len(loader) == 3 * 2 * 3 * accumulate
    ids = torch.cat([batch["input_ids"][:, 0] for batch in batches])
    orders = ids.view(6, 24)  # of three rollouts two epochs each
    assert all(order.sort().values.tolist() == list(range(24)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert [batch["policy_version"] for batch in batches] == [n for n in range(3) for _ in range(6 * accumulate)]


def test_columns_behind_the_last_learned_token_are_left_out(make_trainer):
    plan = RolloutPlan(samples_per_prompt=6, minibatches=24)
    whole = rows_of(0, None)
    for batch in ExperienceLoader(rows_of, Prompts(1), plan, make_trainer()):
        row = int(batch["input_ids"][0, 0])
        width = 2 if row % 5 == 0 else 2 + row % 5
        assert batch["input_ids"].shape == batch["labels"].shape == (1, width)
        assert batch["old_logprobs"].tolist() == whole["old_logprobs"][row : row + 1, : width - 1].tolist()
        assert batch["advantages"].tolist() == [row]


def test_answers_that_cannot_be_shared_out_are_refused(make_trainer):
    plan = RolloutPlan(samples_per_prompt=6, minibatches=5)
    with pytest.raises(ConfigurationError, match=r"4 prompts x samples_per_prompt=6 give 24 .* minibatches=5 x"):
        ExperienceLoader(rows_of, Prompts(), plan, make_trainer())


def test_a_change_of_accumulation_is_refused(make_trainer):
    trainer = make_trainer(accumulate_grad_batches=2)
    loader = ExperienceLoader(rows_of, Prompts(), RolloutPlan(samples_per_prompt=6), trainer)
    trainer.accumulate_grad_batches = 4
    with pytest.raises(ConfigurationError, match="changed from 2 to 4"):
        next(iter(loader))


def fit_loop(ready, processed, completed, earlier=0):
    def counts(more):
        return {
            "ready": ready + more,
            "started": ready + more,
            "processed": processed + more,
            "completed": completed + more,
        }

    progress = {"current": counts(0), "total": counts(earlier), "is_last_batch": False}
    return {"epoch_loop.batch_progress": progress}


def test_a_finished_rollout_is_left_as_it_is():
    loop = fit_loop(8, 8, 7)
    skip_unfinished_rollout(loop, was={"batches_per_rollout": 4, "batches_per_epoch": 40}, now=4)
    assert loop == fit_loop(8, 8, 7)


@pytest.mark.parametrize(("ready", "processed", "completed", "left"), [(6, 6, 5, 2), (6, 5, 5, 3), (6, 6, 6, 2)])
def test_the_rest_of_a_rollout_is_dropped(ready, processed, completed, left):
    loop = fit_loop(ready, processed, completed, earlier=13)
    with pytest.warns(UserWarning, match=f"its last {left} of 4 micro-batches are dropped"):
        skip_unfinished_rollout(loop, was={"batches_per_rollout": 4, "batches_per_epoch": 40}, now=4)
    assert loop == fit_loop(8, 8, 8 - (processed - completed), earlier=13)


def test_the_last_rollout_of_an_epoch_ends_it():
    loop = fit_loop(7, 7, 6)
    with pytest.warns(UserWarning, match="dropped"):
        skip_unfinished_rollout(loop, was={"batches_per_rollout": 4, "batches_per_epoch": 8}, now=4)
    assert loop["epoch_loop.batch_progress"]["is_last_batch"]


def test_other_micro_batches_are_counted_anew():
    loop = fit_loop(8, 8, 7)
    skip_unfinished_rollout(loop, was={"batches_per_rollout": 4, "batches_per_epoch": 40}, now=12)
    assert loop == fit_loop(24, 24, 23)
