"""PPO: rewards become advantages of tokens, the critic learns, the fee adapts, gradients are exact."""

import dataclasses

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from recorded_gradients import Record

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional import KLPenalty, SequenceMean
from lightning_lm.models import parameter_roles
from lightning_lm.modules import Critic, KLReward, Objective, PPOModule, RolloutPlan, ValueModel
from lightning_lm.optim import AdamW, Constant, Muon
from lightning_lm.types import IGNORE_INDEX

PLAN = RolloutPlan(samples_per_prompt=6, max_new_tokens=5)
FAST = AdamW(lr=1e-2, weight_decay=0.0)


def share_of_ones(*, completions, **columns):
    return [completion.count("1") / 5 for completion in completions]


def module_of(model, plan=PLAN, reward=share_of_ones, **settings):
    return PPOModule(model, rewards=[reward], plan=plan, **{"optimizer": FAST, "schedule": Constant(), **settings})


def randomised(model):
    """A critic whose values are not all zero."""
    torch.manual_seed(5)
    torch.nn.init.normal_(model.value.weight)
    torch.nn.init.normal_(model.value.bias)
    return model


# --- the critic ---


def test_values_are_those_before_each_learned_token(policy, rows):
    critic, batch = randomised(ValueModel(policy())), rows(5)
    batch["input_ids"] = batch["input_ids"] % 13
    found = critic(batch)
    hidden = critic.body.double().hidden(batch["input_ids"][:, :-1])
    wanted = hidden @ critic.value.weight.double()[0] + critic.value.bias.double()
    learned = batch["labels"][:, 1:] != IGNORE_INDEX
    torch.testing.assert_close(found.double(), torch.where(learned, wanted, 0.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_every_trained_parameter_of_the_critic_gets_a_gradient(config, rows, tie):
    critic = randomised(ValueModel(dataclasses.replace(config, tie_embeddings=tie).build()))
    critic(rows(8)).sum().backward()
    trained = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    frozen = [name for name, parameter in critic.named_parameters() if not parameter.requires_grad]
    assert frozen == ([] if tie else ["body.head.weight"])


def test_a_model_without_features_is_refused():
    with pytest.raises(ConfigurationError, match="Linear has no 'hidden'"):
        ValueModel(torch.nn.Linear(2, 2))


def test_the_critic_has_groups_of_its_own_in_one_optimizer(policy, prompt_data, make_trainer):
    module = module_of(policy(), optimizer=Muon(lr=0.02), critic=Critic(lr_scale=3.0))
    make_trainer(max_steps=1).fit(module, prompt_data())
    groups = module.trainer.optimizers[0].param_groups
    names = [name for group in groups for name in group["param_names"]]
    learned = [f"critic.{name}" for name, parameter in module.critic.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted([*parameter_roles(module.model), *learned])
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["critic_muon"] == pytest.approx(3 * rates["muon"])
    assert rates["critic_adamw"] == pytest.approx(3 * rates["adamw"])


# --- from rewards to advantages ---


class Kept(PPOModule):
    """Keeps the experience before it is cut."""

    def collect(self, *args, **settings):
        self.kept = super().collect(*args, **settings)
        return self.kept


def test_advantages_are_those_of_the_paper(policy, prompt_data, make_trainer):
    """Against a loop over each answer's tokens from the back, in float64."""
    plan = dataclasses.replace(PLAN, minibatches=2)
    critic, fee = Critic(gamma=0.9, lam=0.8), KLReward(coefficient=0.3)
    module = Kept(policy(), rewards=[share_of_ones], plan=plan, critic=critic, kl=fee, optimizer=FAST)
    make_trainer(max_steps=5, max_epochs=-1).fit(module, prompt_data())
    rows, rollout = module.kept, module.last_rollout[0]
    learned = rows["labels"][:, 1:] != IGNORE_INDEX
    wanted, returns = torch.zeros_like(learned, dtype=torch.float64), torch.zeros_like(learned, dtype=torch.float64)
    for row, total in enumerate(rollout.totals):
        following, advantage = 0.0, 0.0
        places = learned[row].nonzero()[:, 0].tolist()
        for place in reversed(places):
            value = rows["old_values"][row, place].item()
            distance = (rows["old_logprobs"][row, place] - rows["reference_logprobs"][row, place]).item()
            reward = -0.3 * distance + (total if place == places[-1] else 0.0)
            advantage = reward + 0.9 * following - value + 0.9 * 0.8 * advantage
            following, wanted[row, place], returns[row, place] = value, advantage, advantage + value
    assert rows["old_logprobs"][learned].sub(rows["reference_logprobs"][learned]).abs().max() > 1e-3
    values = wanted[learned]
    white = torch.where(learned, (wanted - values.mean()) / values.std(), 0.0)
    torch.testing.assert_close(rows["advantages"].double(), white, rtol=0, atol=2e-5)
    torch.testing.assert_close(rows["returns"].double(), returns, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "kl", "factor"), [(6.0, 60.0, 1.02), (6.0, 0.0, 0.98), (6.0, 6.6, 1.01), (None, 9, 1)]
)
def test_the_fee_adapts_to_its_target(target, kl, factor):
    fee = KLReward(target=target, horizon=1000)
    assert fee.adapted(0.5, kl, 100) == pytest.approx(0.5 * factor)


def test_values_out_of_range_are_refused():
    with pytest.raises(ConfigurationError, match=r"lam=1\.5"):
        Critic(lam=1.5)


# --- gradients ---


ROWS, WINDOW = 20, 16


class Written(PPOModule):
    folder = None

    def configure_model(self):
        super().configure_model()
        randomised(self.critic)

    def on_fit_end(self):
        children = self.trainer.optimizers[0].children
        seen = [{**policy, **critic} for policy, critic in zip(*(child.seen for child in children), strict=True)]
        torch.save(seen, self.folder / f"{self.global_rank}.pt")


@pytest.fixture
def experience(rows):
    batch = rows(ROWS, empty=True)
    torch.manual_seed(3)
    shape = (ROWS, batch["labels"].shape[1] - 1)
    batch |= {"advantages": torch.randn(shape), "old_logprobs": -3.4 + 0.4 * torch.randn(shape)}
    return batch | {"old_values": 0.3 * torch.randn(shape), "returns": torch.randn(shape)}


def exact(config, batch):
    torch.manual_seed(0)
    model = config.build()
    critic = randomised(ValueModel(model)).double()
    model.double()
    losses, count = 0.0, 0
    for row in range(len(batch["labels"])):
        targets = batch["labels"][row, 1:]
        learned = (targets != IGNORE_INDEX).nonzero()[:, 0]
        if not len(learned):
            continue
        ids = batch["input_ids"][row : row + 1, :-1]
        chosen = torch.log_softmax(model(ids)[0], -1)[learned].gather(-1, targets[learned, None])[:, 0]
        of = {name: batch[name][row, learned].double() for name in batch if name not in ("input_ids", "labels")}
        ratio = (chosen - of["old_logprobs"]).exp()
        policy = -torch.minimum(ratio * of["advantages"], ratio.clamp(0.8, 1.2) * of["advantages"])
        values = (critic.body.hidden(ids)[0] @ critic.value.weight[0] + critic.value.bias)[learned]
        held = of["old_values"] + (values - of["old_values"]).clamp(-0.2, 0.2)
        error = 0.5 * torch.maximum((values - of["returns"]) ** 2, (held - of["returns"]) ** 2)
        losses, count = losses + (policy + 0.5 * error).mean(), count + 1
    (losses / count).backward()
    named = [*model.named_parameters(), *((f"critic.{name}", value) for name, value in critic.named_parameters())]
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (1, 4), (1, 16), (2, 2)])
def test_gradients_do_not_depend_on_the_cut(
    config, experience, loader, make_trainer, tmp_path, monkeypatch, devices, accumulate
):
    monkeypatch.setattr(Written, "folder", tmp_path)
    settings = {}
    if devices == 2:
        experience["labels"][1:WINDOW:2] = IGNORE_INDEX  # the second rank has nothing to learn in the first window
        settings = {"strategy": DDPStrategy(start_method="fork", process_group_backend="gloo")}
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate, devices=devices, **settings)
    torch.manual_seed(0)
    objective = Objective(reduction=SequenceMean())
    module = Written(config.build(), rewards=[share_of_ones], objective=objective, kl=None, optimizer=Record())
    size = WINDOW // accumulate // devices

    class Shares:
        def __len__(self):
            return len(loader(experience, size, ranks=devices))

        def __iter__(self):
            for batch in loader(experience, size, rank=trainer.global_rank, ranks=devices):
                yield {**batch, "tokens_per_row": 3.0}

    trainer.fit(module, Shares())
    seen = torch.load(tmp_path / "0.pt", weights_only=True)
    windows = [
        {name: value[part] for name, value in experience.items()} for part in (slice(WINDOW), slice(WINDOW, ROWS))
    ]
    assert len(seen) == 2
    for found, window in zip(seen, windows, strict=True):
        wanted = exact(config, window)
        assert found.keys() == wanted.keys()
        difference = sum((found[name].double() - wanted[name]).square().sum() for name in wanted)
        assert (difference / sum(value.square().sum() for value in wanted.values())).sqrt() < 1e-6


# --- runs ---


def test_the_reward_rises(policy, prompt_data, make_trainer):
    plan = dataclasses.replace(PLAN, samples_per_prompt=16, minibatches=2)
    module = module_of(policy(), plan, critic=Critic(lr_scale=1.0), kl=None)
    trainer = make_trainer(max_steps=24, max_epochs=-1, gradient_clip_val=1.0, log_every_n_steps=2)
    trainer.fit(module, prompt_data())
    assert module.last_metrics["train/reward"] > 0.5


def test_the_policy_waits_while_the_critic_learns(policy, prompt_data, make_trainer):
    module = module_of(policy(), critic=Critic(warmup=3))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    make_trainer(max_steps=3, max_epochs=-1).fit(module, prompt_data())
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert module.critic.value.weight.abs().max() > 0


def test_resuming_changes_no_bit(policy, prompt_data, make_trainer, tmp_path):
    plan = dataclasses.replace(PLAN, minibatches=2)

    def run(steps, path=None):
        module = module_of(
            policy(), plan, kl=KLReward(target=0.01, horizon=100), objective=Objective(kl=KLPenalty(coefficient=0.1))
        )
        trainer = make_trainer(max_steps=steps, max_epochs=-1)
        trainer.fit(module, prompt_data(), ckpt_path=path, weights_only=True)
        return module

    straight = run(8)
    run(4).trainer.save_checkpoint(tmp_path / "four.ckpt")
    again = run(8, tmp_path / "four.ckpt")
    wanted = straight.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    assert again.kl_coefficient == straight.kl_coefficient != 0.05


def test_an_answer_without_a_reward_teaches_nothing(policy, prompt_data, make_trainer):
    def first_only(*, completions, **columns):
        return [1.0] + [None] * (len(completions) - 1)

    module = Kept(policy(), rewards=[first_only], plan=PLAN, kl=None)
    make_trainer(max_steps=1).fit(module, prompt_data())
    assert np.isnan(module.last_rollout[0].totals[1:]).all()
    assert module.kept["advantages"][1:].abs().max() == 0
