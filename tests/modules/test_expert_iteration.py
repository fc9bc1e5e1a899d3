"""Expert iteration: a step on the answers that earned enough is a step of supervised fine-tuning on them."""

import pytest
import torch
import torch.nn.functional as F

from lightning_lm.functional import PolicyGradient, RewardFilter, RolloutTokenMean, TokenMean
from lightning_lm.modules import GRPOModule, Objective, RolloutPlan
from lightning_lm.optim import SGD, Constant

LEARNING_RATE = 0.5


def share_of_ones(*, completions, **columns):
    """None where an answer is empty: such an answer is never imitated."""
    return [completion.count("1") / len(completion) if completion else None for completion in completions]


def module_of(model, threshold, reduction, plan):
    return GRPOModule(
        model,
        rewards=[share_of_ones],
        plan=plan,
        advantage=RewardFilter(threshold=threshold),
        objective=Objective(loss=PolicyGradient(), reduction=reduction),
        optimizer=SGD(lr=LEARNING_RATE, momentum=0.0, weight_decay=0.0),
        schedule=Constant(),
    )


def gradients_of_imitation(model, answers):
    """Float64, answer by answer: the mean over all their tokens."""
    model, total, tokens = model.double(), 0.0, 0
    for answer in answers:
        ids = torch.tensor([*answer.prompt_ids, *answer.token_ids])
        logits, start = model(ids[None, :-1])[0], len(answer.prompt_ids)
        total = total + F.cross_entropy(logits[start - 1 :], ids[start:], reduction="sum")
        tokens += len(answer.token_ids)
    (total / tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("reduction", [TokenMean(), RolloutTokenMean()], ids=lambda part: type(part).__name__)
def test_a_step_is_one_of_fine_tuning_on_the_good_answers(policy, prompt_data, make_trainer, accumulate, reduction):
    before = policy()
    module = module_of(policy(), 0.2, reduction, RolloutPlan(samples_per_prompt=8, max_new_tokens=5))
    trainer = make_trainer(max_steps=1, accumulate_grad_batches=accumulate, limit_val_batches=0)
    trainer.fit(module, datamodule=prompt_data())
    answers = module.last_rollout[0].completions
    good = [answer for answer in answers if answer.text and share_of_ones(completions=[answer.text])[0] >= 0.2]
    assert 3 < len(good) < len(answers) - 3
    wanted = gradients_of_imitation(policy(), good)
    moved = dict(module.model.named_parameters())
    for name, parameter in before.named_parameters():
        found = (parameter - moved[name]) / LEARNING_RATE
        torch.testing.assert_close(found.double(), wanted[name], rtol=1e-4, atol=1e-6)


def test_where_nothing_is_good_enough_nothing_changes(policy, prompt_data, make_trainer):
    before = policy().state_dict()
    module = module_of(policy(), 1.5, TokenMean(), RolloutPlan(samples_per_prompt=2, max_new_tokens=3, minibatches=2))
    make_trainer(max_steps=4, limit_val_batches=0).fit(module, datamodule=prompt_data())
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
