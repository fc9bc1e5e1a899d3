"""GRPO: exact gradients however the window is cut, fresh ratios of one, no-ops, checkpoints, resuming, ranks."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from recorded_gradients import Record
from torch.utils.data import DataLoader

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional import (
    ClippedSurrogate,
    ConstantLength,
    GroupAdvantage,
    KLPenalty,
    RolloutTokenMean,
    SequenceMean,
    TokenMean,
)
from lightning_lm.generation import Sampling
from lightning_lm.modules import GRPOModule, Objective, RolloutPlan, Validation, load_model
from lightning_lm.optim import SGD, AdamW, Constant
from lightning_lm.rewards import ExactAnswer, RewardError, Scoring
from lightning_lm.types import IGNORE_INDEX

PLAN = RolloutPlan(samples_per_prompt=6, max_new_tokens=5)
FAST = AdamW(lr=1e-2, weight_decay=0.0)


def share_of_ones(*, completions, **columns):
    """Something that an untrained policy can be better or worse at."""
    return [completion.count("1") / 5 for completion in completions]


def constant(*, completions, **columns):
    return [0.7] * len(completions)


def module_of(model, plan=PLAN, reward=share_of_ones, **settings):
    return GRPOModule(model, rewards=[reward], plan=plan, **{"optimizer": FAST, "schedule": Constant(), **settings})


def weights_of(module):
    return {name: value.clone() for name, value in module.model.state_dict().items()}


# --- gradients ---


ROWS, WINDOW = 20, 16
KL, ENTROPY = 0.3, 0.05
REDUCTIONS = [TokenMean(), SequenceMean(), ConstantLength(max_tokens=5), RolloutTokenMean()]


@pytest.fixture
def experience(rows):
    """One full window of 16 rows and a partial one of 4; rows 4 to 7 learn nothing."""
    batch = rows(ROWS, empty=True)
    shape = (ROWS, batch["labels"].shape[1] - 1)
    torch.manual_seed(3)
    batch["advantages"] = torch.randn(ROWS)
    batch["old_logprobs"] = -3.4 + 0.4 * torch.randn(shape)
    batch["reference_logprobs"] = -3.4 + 0.4 * torch.randn(shape)
    return batch


def exact(model, batch, reduction, per_row):
    """Float64, row by row, as it stands in the papers."""
    model, losses, count, tokens_seen = model.double(), 0.0, 0, 0
    for row in range(len(batch["labels"])):
        targets = batch["labels"][row, 1:]
        learned = (targets != IGNORE_INDEX).nonzero()[:, 0]
        logp = torch.log_softmax(model(batch["input_ids"][row : row + 1, :-1])[0], -1)[learned]
        chosen = logp.gather(-1, targets[learned, None])[:, 0]
        old, other = (batch[name][row, learned].double() for name in ("old_logprobs", "reference_logprobs"))
        advantage, ratio = batch["advantages"][row].double(), (chosen - old).exp()
        policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        slope = ratio.detach() * (chosen - other).detach() * chosen  # the reverse KL's gradient by importance sampling
        terms = policy + KL * slope + ENTROPY * (logp.exp() * logp).sum(-1)
        share = {"SequenceMean": 1 / max(1, len(learned)), "ConstantLength": 1 / 5}.get(type(reduction).__name__, 1)
        losses, count, tokens_seen = (
            losses + share * terms.sum(),
            count + bool(len(learned)),
            tokens_seen + len(learned),
        )
    count = {"TokenMean": tokens_seen, "RolloutTokenMean": per_row * len(batch["labels"])}.get(
        type(reduction).__name__, count
    )
    (losses / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def distance(found, wanted):
    difference = sum((found[name].double() - wanted[name]).square().sum() for name in wanted)
    return (difference / sum(value.square().sum() for value in wanted.values())).sqrt().item()


def train_on(experience, loader, trainer, model, reduction, size, module_class=GRPOModule):
    objective = Objective(reduction=reduction, kl=KLPenalty(coefficient=KL), entropy_coefficient=ENTROPY)
    module = module_class(model, rewards=[constant], plan=PLAN, objective=objective, optimizer=Record())
    per_row = (experience["labels"][:, 1:] != IGNORE_INDEX).sum().item() / ROWS

    class Shares:
        def __len__(self):
            return len(loader(experience, size, ranks=trainer.num_devices))

        def __iter__(self):
            for batch in loader(experience, size, rank=trainer.global_rank, ranks=trainer.num_devices):
                yield {**batch, "tokens_per_row": per_row}

    trainer.fit(module, Shares())
    return module, per_row


def windows(batch):
    return [{name: value[part] for name, value in batch.items()} for part in (slice(WINDOW), slice(WINDOW, ROWS))]


@pytest.mark.parametrize("accumulate", [1, 4, 16])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: type(reduction).__name__)
def test_gradients_do_not_depend_on_micro_batches(config, experience, loader, make_trainer, accumulate, reduction):
    torch.manual_seed(0)
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate)
    _, per_row = train_on(experience, loader, trainer, config.build(), reduction, WINDOW // accumulate)
    seen = trainer.optimizers[0].children[0].seen
    assert len(seen) == 2
    for found, window in zip(seen, windows(experience), strict=True):
        torch.manual_seed(0)
        assert distance(found, exact(config.build(), window, reduction, per_row)) < 1e-6


class Writer(GRPOModule):
    folder = None

    def on_fit_end(self):
        torch.save(self.trainer.optimizers[0].children[0].seen, self.folder / f"{self.global_rank}.pt")


def two_processes():
    return {"devices": 2, "strategy": DDPStrategy(start_method="fork", process_group_backend="gloo")}


@pytest.mark.parametrize("reduction", [SequenceMean(), RolloutTokenMean()], ids=lambda part: type(part).__name__)
def test_gradients_do_not_depend_on_ranks(config, experience, loader, make_trainer, tmp_path, monkeypatch, reduction):
    experience["labels"][1:WINDOW:2] = IGNORE_INDEX  # the second rank has nothing to learn in the first window
    monkeypatch.setattr(Writer, "folder", tmp_path)
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=2, **two_processes())
    torch.manual_seed(0)
    _, per_row = train_on(experience, loader, trainer, config.build(), reduction, WINDOW // 4, Writer)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for found, window in zip(seen, windows(experience), strict=True):
            torch.manual_seed(0)
            wanted = exact(config.build(), window, reduction, per_row)
            assert distance({name.removeprefix("module."): value for name, value in found.items()}, wanted) < 1e-6


# --- rollouts ---


class Watch(Callback):
    """Notes the age of each batch, and the ratio of the policy to the one that sampled."""

    def __init__(self):
        self.ages, self.batches = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ages.append(trainer.global_step - batch["policy_version"])
        self.batches.append(batch)


def test_constant_reward_leaves_every_bit(policy, prompt_data, make_trainer):
    plan = dataclasses.replace(PLAN, minibatches=2)
    module = module_of(policy(), plan, constant)
    before = weights_of(module)
    make_trainer(max_steps=8, max_epochs=-1, gradient_clip_val=1.0).fit(module, prompt_data())
    assert all(torch.equal(value, before[name]) for name, value in weights_of(module).items())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_fresh_ratio_is_one_and_a_used_one_is_not(policy, prompt_data, make_trainer, temperature):
    plan = dataclasses.replace(PLAN, minibatches=2, sampling=Sampling(temperature=temperature))
    module, found = module_of(policy(), plan), []
    module.record_max = lambda name, value: found.append(float(value)) if name == "ratio/max" else None
    make_trainer(max_steps=4, max_epochs=-1).fit(module, prompt_data())
    assert [abs(ratio - 1) < 1e-4 for ratio in found] == [True, False, True, False]


def test_a_ratio_to_the_sampler_is_the_same_with_a_pass_less(policy, prompt_data, make_trainer):
    """In float32, from the module's own model: what sampling records is what training would compute."""
    trained, passes = {}, {}
    for ratio_to in ("policy", "sampler"):
        plan = dataclasses.replace(PLAN, minibatches=3, epochs=2)
        module = module_of(policy(), plan, objective=Objective(ratio_to=ratio_to))
        scored = module.token_scores
        passes[ratio_to] = 0

        def counted(model, batch, scored=scored, ratio_to=ratio_to):
            passes[ratio_to] += not torch.is_grad_enabled()
            return scored(model, batch)

        module.token_scores = counted
        make_trainer(max_steps=12, limit_val_batches=0).fit(module, datamodule=prompt_data())
        trained[ratio_to] = weights_of(module)
    assert passes == {"policy": 4, "sampler": 0}  # of two rollouts; the first third is learned at once
    for name, value in trained["policy"].items():
        torch.testing.assert_close(trained["sampler"][name], value, rtol=1e-3, atol=1e-4)


class Sampled(GRPOModule):
    """Computes the probabilities of all answers before it learns from any, and notes the gradients of each step."""

    def collect(self, prompts, *args, **settings):
        rows = super().collect(prompts, *args, **settings)
        with torch.no_grad():
            self.sampled = self.token_scores(self.model, rows).logprobs
        self.missing = rows["old_logprobs"][:, 0].isnan().sum().item()
        self.answers = rows["input_ids"]
        return rows

    def objective_terms(self, batch):
        ids = batch["input_ids"]
        same = (self.answers[:, : ids.shape[1]] == ids[:, None]).all(-1).float().argmax(1)
        wanted = self.sampled[same, : ids.shape[1] - 1]
        self.compared = [*getattr(self, "compared", []), "old_logprobs" in batch]
        if "old_logprobs" in batch:
            torch.testing.assert_close(batch["old_logprobs"], wanted, rtol=0, atol=1e-5)
        found = super().objective_terms(batch)
        oracle = self.objective(self.token_scores(self.model, batch), {**batch, "old_logprobs": wanted})
        torch.testing.assert_close(found.loss.loss_sum, oracle.loss.loss_sum, rtol=1e-5, atol=1e-5)
        self.gradients = [*getattr(self, "gradients", []), (self.gradient(found), self.gradient(oracle))]
        return found

    def gradient(self, terms):
        return torch.autograd.grad(terms.loss.loss_sum, self.model.head.weight, retain_graph=True)[0]


@pytest.mark.parametrize(("accumulate", "minibatches", "epochs"), [(1, 2, 1), (2, 2, 2), (1, 1, 3)])
def test_what_the_first_step_computes_is_what_later_ones_compare_with(
    policy, prompt_data, make_trainer, accumulate, minibatches, epochs
):
    """Against a pass over all answers: log-probabilities, losses and gradients."""
    plan = dataclasses.replace(PLAN, minibatches=minibatches, epochs=epochs)
    objective = Objective(kl=KLPenalty(coefficient=0.1))
    module = Sampled(policy(), rewards=[share_of_ones], plan=plan, optimizer=FAST, objective=objective)
    trainer = make_trainer(max_steps=2 * plan.steps, accumulate_grad_batches=accumulate, limit_val_batches=0)
    trainer.fit(module, prompt_data())
    once = [step > 0 for step in range(plan.steps) for _ in range(accumulate)]
    assert module.compared == 2 * once
    assert module.missing == 24 // minibatches
    assert not module.last_rollout[1]["old_logprobs"].isnan().any() or epochs == 1
    for found, wanted in module.gradients:
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert any(wanted.norm() > 1e-3 for _, wanted in module.gradients)


@pytest.mark.parametrize("settings", [{"importance_cap": 2.0}, {"max_staleness": 2}])
def test_a_pass_over_all_answers_is_made_where_a_plan_needs_it(policy, prompt_data, make_trainer, settings):
    watch = Watch()
    module = module_of(policy(), dataclasses.replace(PLAN, minibatches=2, **settings))
    make_trainer(max_steps=4, callbacks=[watch], limit_val_batches=0).fit(module, prompt_data())
    assert all(not batch["old_logprobs"].isnan().any() for batch in watch.batches)


def test_a_ratio_to_the_sampler_is_refused_where_the_two_differ(policy):
    with pytest.raises(ConfigurationError, match="ratio_to='policy'"):
        module_of(policy(), dataclasses.replace(PLAN, importance_cap=2.0), objective=Objective(ratio_to="sampler"))


def test_a_raw_batch_of_prompts_is_learned_at_once_whatever_the_plan(policy, digits, prompt_data, make_trainer):
    data = prompt_data()
    data.setup()
    prompts = DataLoader(range(4), batch_size=2, collate_fn=lambda places: data._train.batch(np.array(places)))
    module = module_of(policy(), dataclasses.replace(PLAN, minibatches=2))
    module.tokenizer = digits
    make_trainer(max_epochs=1).fit(module, prompts)
    assert "old_logprobs" not in module.last_rollout[1]
    assert all(value.isfinite().all() for value in weights_of(module).values())


@pytest.mark.parametrize(("accumulate", "minibatches", "epochs"), [(1, 1, 1), (2, 3, 1), (3, 2, 2)])
def test_steps_are_exact_and_experience_is_fresh(
    policy, prompt_data, make_trainer, tmp_path, accumulate, minibatches, epochs
):
    plan = dataclasses.replace(PLAN, minibatches=minibatches, epochs=epochs)
    watch, saved = Watch(), ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer = make_trainer(
        max_steps=13,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[watch, saved],
        enable_checkpointing=True,
        gradient_clip_val=1.0,
    )
    trainer.fit(module_of(policy(), plan), prompt_data())
    assert trainer.global_step == 13
    assert sorted(path.stem for path in tmp_path.glob("*.ckpt")) == ["step=10", "step=5"]
    steps = minibatches * epochs
    assert watch.ages == [step % steps for step in range(13) for _ in range(accumulate)]


def test_what_is_fetched_ahead_is_refused(policy, prompt_data, make_trainer):
    class Unsized:
        def __init__(self, loader):
            self.loader = loader

        def __iter__(self):
            return iter(self.loader)

    class Hidden(GRPOModule):
        def experience_loader(self, prompts):
            return Unsized(super().experience_loader(prompts))

    module = Hidden(policy(), rewards=[constant], plan=PLAN)
    with pytest.raises(ConfigurationError, match="1 optimizer steps old, and the plan allows 0"):
        make_trainer(max_steps=3).fit(module, prompt_data())


def test_a_raw_batch_of_prompts_is_answered_first(policy, digits, prompt_data, make_trainer):
    data = prompt_data()
    data.setup()
    prompts = DataLoader(range(4), batch_size=2, collate_fn=lambda places: data._train.batch(np.array(places)))
    module = module_of(policy())
    module.tokenizer = digits
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, prompts)
    assert trainer.global_step == 2
    assert len(module.last_rollout[0]) == 2 * PLAN.samples_per_prompt


def test_the_reward_rises(policy, prompt_data, make_trainer):
    """An untrained policy finds out within a few rollouts that ones are paid for."""
    plan = dataclasses.replace(PLAN, samples_per_prompt=16, minibatches=2)
    module = module_of(policy(), plan, objective=Objective(reduction=ConstantLength(max_tokens=5)))
    trainer = make_trainer(max_steps=24, max_epochs=-1, gradient_clip_val=1.0, log_every_n_steps=2)
    trainer.fit(module, prompt_data())
    assert module.last_metrics["train/reward"] > 0.5
    assert module.last_metrics["train/completions/mean_length"] == 5


def test_validation_counts_right_answers(policy, prompt_data, make_trainer):
    plan = dataclasses.replace(PLAN, validation=Validation(samples=4, sampling=Sampling(), pass_at=(1, 2)))
    module = module_of(policy(), plan, ExactAnswer())
    right = {}

    class Cheat:
        """The first two of each four answers are right."""

        def __call__(self, *, completions, **columns):
            return [float(row % 4 < 2) for row in range(len(completions))]

    module.rewards = [Cheat()]
    data = prompt_data()
    (metrics,) = make_trainer().validate(module, data, verbose=False)
    right = {name: metrics[name] for name in ("val/pass@1", "val/pass@2", "val/reward")}
    assert right == pytest.approx({"val/pass@1": 1 / 2, "val/pass@2": 1 - 1 / 6, "val/reward": 1 / 2})


def test_kl_and_sampler_are_measured(policy, prompt_data, make_trainer):
    objective = Objective(loss=ClippedSurrogate(clip_high=0.3), kl=KLPenalty(coefficient=0.1))
    plan = dataclasses.replace(PLAN, importance_cap=2.0)
    watch, module = Watch(), module_of(policy(), plan, objective=objective)
    trainer = make_trainer(max_steps=3, max_epochs=-1, callbacks=[watch], log_every_n_steps=1)
    trainer.fit(module, prompt_data())
    first, last = watch.batches[0], watch.batches[-1]
    torch.testing.assert_close(first["old_logprobs"], first["reference_logprobs"], rtol=0, atol=1e-6)
    assert not torch.allclose(last["old_logprobs"], last["reference_logprobs"], atol=1e-3)
    assert module.last_metrics["train/kl"] > 0
    assert module.last_metrics["train/sampling/sampling_logp_difference/max"] < 1e-4
    assert not any(parameter.requires_grad for parameter in module.reference.parameters())


@pytest.mark.parametrize("weights", [(0.5,), (1.0, 2.0, 3.0)])
def test_another_number_of_weights_than_rewards_is_refused_before_training(policy, weights):
    plan = dataclasses.replace(PLAN, reward_weights=weights)
    with pytest.raises(ConfigurationError, match=r"factors for 2 rewards \(ExactAnswer, ExactAnswer\)"):
        GRPOModule(policy(), rewards=[ExactAnswer(), ExactAnswer()], plan=plan)


def test_a_run_without_any_reward_says_that_nothing_was_learned(policy, prompt_data, make_trainer):
    module = module_of(policy(), reward=lambda completion: 0.0)
    with pytest.warns(UserWarning, match=r"Nothing was learned from the [\d,]+ completions"):
        make_trainer(max_steps=2).fit(module, prompt_data())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Nothing was learned")
        make_trainer(max_steps=2).fit(module_of(policy()), prompt_data())


# --- resuming ---


def resumed(prompt_data, make_trainer, model, path, steps, plan, **settings):
    module, watch = module_of(model, plan, **settings), Watch()
    trainer = make_trainer(max_steps=steps, max_epochs=-1, callbacks=[watch])
    trainer.fit(module, prompt_data(), ckpt_path=path, weights_only=True)
    return module, watch, trainer


def test_resuming_between_rollouts_changes_no_bit(policy, prompt_data, make_trainer, tmp_path):
    plan = dataclasses.replace(PLAN, minibatches=2)
    settings = {"objective": Objective(kl=KLPenalty())}
    straight, _, trainer = resumed(prompt_data, make_trainer, policy(), None, 10, plan, **settings)
    _, _, trainer = resumed(prompt_data, make_trainer, policy(), None, 4, plan, **settings)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dropped")
        again, watch, _ = resumed(prompt_data, make_trainer, policy(), tmp_path / "four.ckpt", 10, plan, **settings)
    assert len(watch.ages) == 6
    wanted = weights_of(straight)
    assert all(torch.equal(value, wanted[name]) for name, value in weights_of(again).items())
    model, tokenizer = load_model(tmp_path / "four.ckpt")
    assert model.config == straight.model.config
    assert tokenizer.eos_id == 12
    loaded = GRPOModule.load_from_checkpoint(  # without a Trainer
        tmp_path / "four.ckpt", model=model.config, rewards=[share_of_ones], weights_only=True, **settings
    )
    assert int(loaded.tokens_seen) > 0


@pytest.mark.parametrize(("stop", "steps_left"), [(5, 4), (11, 0)])
def test_a_rollout_that_was_not_finished_is_dropped(policy, prompt_data, make_trainer, tmp_path, stop, steps_left):
    """Three rollouts of four steps make an epoch; the checkpoint comes within the second, or the last."""
    plan = dataclasses.replace(PLAN, minibatches=4)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    trainer = make_trainer(max_epochs=1, callbacks=[saved], enable_checkpointing=True)
    trainer.fit(module_of(policy(), plan), prompt_data())
    assert trainer.global_step == 12
    for max_epochs in (1, 2):
        module, watch = module_of(policy(), plan), Watch()
        trainer = make_trainer(max_epochs=max_epochs, callbacks=[watch])
        with pytest.warns(UserWarning, match=r"within a rollout; its last [13] of 4 micro-batches are dropped"):
            trainer.fit(module, prompt_data(), ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True)
        assert trainer.global_step == stop + steps_left + 12 * (max_epochs - 1)
        assert watch.ages == [0, 1, 2, 3] * (len(watch.ages) // 4)
        assert trainer.datamodule.prompts_consumed == 12 * max_epochs


def test_a_run_killed_while_it_samples_goes_on(policy, prompt_data, make_trainer, tmp_path):
    calls = []

    def dies(*, completions, **columns):
        calls.append(len(completions))
        if len(calls) >= 3:
            raise ValueError("power cut")
        return share_of_ones(completions=completions)

    plan = dataclasses.replace(PLAN, minibatches=2, scoring=Scoring(stop_on_failure=True))
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = make_trainer(max_steps=10, max_epochs=-1, callbacks=[saved], enable_checkpointing=True)
    with pytest.raises(RewardError, match="power cut"):
        trainer.fit(module_of(policy(), plan, dies), prompt_data())
    assert trainer.global_step == 4
    again, _, trainer = resumed(prompt_data, make_trainer, policy(), tmp_path / "step=4.ckpt", 10, plan)
    straight, _, _ = resumed(prompt_data, make_trainer, policy(), None, 10, plan)
    wanted = weights_of(straight)
    assert all(torch.equal(value, wanted[name]) for name, value in weights_of(again).items())


def test_other_micro_batches_go_on_too(policy, prompt_data, make_trainer, tmp_path):
    plan = dataclasses.replace(PLAN, minibatches=2)
    module = module_of(policy(), plan, optimizer=SGD(lr=0.1))
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="four")
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[saved], enable_checkpointing=True)
    trainer.fit(module, prompt_data())
    module, watch = module_of(policy(), plan, optimizer=SGD(lr=0.1)), Watch()
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[watch])
    trainer.fit(module, prompt_data(), ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    assert trainer.global_step == 6  # three rollouts of two steps
    assert watch.ages == [0, 0, 1, 1]


# --- ranks ---


class Diary(GRPOModule):
    folder = None

    def collect(self, prompts, *args, **settings):
        rows = super().collect(prompts, *args, **settings)
        rollout = self.last_rollout[0]
        self.diary = [*getattr(self, "diary", []), (rollout.prompts["prompts"], rows["advantages"].tolist())]
        self.texts = [*getattr(self, "texts", []), tuple(answer.text for answer in rollout.completions)]
        return rows

    def on_fit_end(self):
        state = {"diary": self.diary, "texts": self.texts, "steps": self.trainer.global_step}
        torch.save({**state, "weights": dict(self.model.state_dict())}, self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize("scale", ["none", "batch"])
def test_a_group_is_never_split_and_ranks_stay_equal(policy, prompt_data, make_trainer, tmp_path, monkeypatch, scale):
    monkeypatch.setattr(Diary, "folder", tmp_path)
    plan = dataclasses.replace(PLAN, minibatches=2, resample_rounds=1)
    advantage = GroupAdvantage(scale=scale)
    module = Diary(policy(), rewards=[share_of_ones], plan=plan, advantage=advantage, optimizer=FAST)
    trainer = make_trainer(max_steps=6, max_epochs=-1, **two_processes())
    trainer.fit(module, prompt_data(24))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["steps"] == second["steps"] == 6
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["texts"] != second["texts"]
    for (mine, ours), (theirs, others) in zip(first["diary"], second["diary"], strict=True):
        assert len(mine) == len(theirs) == 2
        assert len(ours) == len(others) == 2 * PLAN.samples_per_prompt
        advantages = torch.tensor([ours, others], dtype=torch.float64)
        assert advantages.view(4, -1).mean(1).abs().max() < 1e-6  # whole groups
        if scale == "batch" and advantages.abs().max() > 0:
            rewards = advantages.flatten()
            assert 0.5 < rewards.std() < 1.01  # of both ranks together, and not of either alone
