"""Curricula: the rule that moves between levels, and prompts that follow the success rate through Trainer.fit."""

import dataclasses

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from post_training_runs import TOKENIZER, WrittenBackend, small_policy

from lightning_lm.data import Curriculum, Examples
from lightning_lm.data.post_training.curriculum import LevelState
from lightning_lm.datamodules import PromptDataModule
from lightning_lm.errors import ConfigurationError, FingerprintError
from lightning_lm.modules import GRPOModule, PPOModule, RolloutPlan
from lightning_lm.optim import SGD, Constant
from lightning_lm.parts import Part

LEVELS = tuple(Examples([{"prompt": f"{level}{number}=", "hard": level} for number in range(8)]) for level in range(4))
RULE = {"raise_at": 0.75, "lower_at": 0.25, "window": 16}


def levels_by_hand(outcomes, *, window, raise_at, lower_at, top, level=0):
    """Return the level of each rollout, from the number right and the number of completions of each."""
    levels, right, count = [], 0, 0
    for good, total in outcomes:
        levels.append(level)
        right, count = right + good, count + total
        if count >= window:
            if good_enough := right / count >= raise_at:
                level = min(top, level + good_enough)
            elif right / count < lower_at:
                level = max(0, level - 1)
            right = count = 0
    return levels


@pytest.mark.parametrize("window", [1, 16, 20])
def test_the_level_follows_the_success_rate(window):
    generator = torch.Generator().manual_seed(window)
    outcomes = [(int(torch.randint(9, (1,), generator=generator)), 8) for _ in range(100)]
    rule = Curriculum(LEVELS, raise_at=0.6, lower_at=0.4, window=window)
    state, found = LevelState(), []
    for outcome in outcomes:
        found.append(state.level)
        state = rule.advance(state, *outcome)
    assert found == levels_by_hand(outcomes, window=window, raise_at=0.6, lower_at=0.4, top=3)
    assert set(found) == {0, 1, 2, 3}
    assert rule.advance(LevelState(level=2), 0, 0) == LevelState(level=2)  # no reward applied


def graded(*, completions, hard, **columns):
    """Everything is right up to level 1, a quarter at level 2, nothing at level 3."""
    return [float(level < 2 or (level == 2 and number % 4 == 0)) for number, level in enumerate(hard)]


class Seen(Callback):
    def __init__(self):
        self.prompts, self.levels = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rollout, _ = pl_module.last_rollout
        if trainer.global_step % pl_module.plan.minibatches == 0:
            self.prompts.append(rollout.prompts["prompts"])
            self.levels.append(pl_module.last_metrics.get("train/curriculum/level"))


def fit(path=None, *, steps=16, kind=GRPOModule, reward=graded, callbacks=(), data=None, **settings):
    torch.manual_seed(0)
    plan = RolloutPlan(samples_per_prompt=4, max_new_tokens=4, minibatches=2, backend=WrittenBackend())
    plan = dataclasses.replace(plan, **settings.pop("plan", {}))
    module = kind(small_policy(), rewards=[reward], plan=plan, optimizer=SGD(lr=1e-3), schedule=Constant())
    seen = Seen()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen, *callbacks],
        use_distributed_sampler=False,
        **{"devices": 1, "enable_checkpointing": bool(callbacks), **settings},
    )
    data = data or PromptDataModule(Curriculum(LEVELS, **RULE), 0, tokenizer=TOKENIZER, batch_size=4)
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return seen, trainer


@pytest.mark.parametrize("kind", [GRPOModule, PPOModule])
def test_prompts_follow_the_success_rate_and_the_level_is_logged(kind):
    seen, trainer = fit(kind=kind)
    # Two levels are mastered at once; a quarter right at level 2 neither raises nor lowers.
    assert [{int(prompt[0]) for prompt in prompts} for prompts in seen.prompts] == [{0}, {1}, *[{2}] * 6]
    assert trainer.lightning_module.last_metrics["train/curriculum/level"] == 2
    assert trainer.lightning_module.last_metrics["train/curriculum/success"] == pytest.approx(0.25)


@pytest.mark.parametrize("stop", [3, 8])
def test_resuming_gives_the_prompts_of_a_run_without_the_stop(tmp_path, stop):
    """Between rollouts, and within one, of which the rest is dropped. The window takes three rollouts."""

    def data():
        rule = Curriculum(LEVELS, **{**RULE, "window": 40})
        return PromptDataModule(rule, 0, tokenizer=TOKENIZER, batch_size=4)

    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight, _ = fit(callbacks=[saved], data=data(), steps=20)
    again, trainer = fit(tmp_path / f"step={stop}.ckpt", data=data(), steps=20 - stop % 2)
    assert again.prompts == straight.prompts[-(-stop // 2) :]
    assert trainer.datamodule.curriculum.state.level == 2


def test_a_rollout_that_is_sampled_again_counts_once(tmp_path):
    """A run that is stopped before it has trained on a rollout goes back by its prompts, and by its success."""
    data = PromptDataModule(Curriculum(LEVELS, **RULE), 0, tokenizer=TOKENIZER, batch_size=4)
    _, trainer = fit(data=data, steps=2)
    data.take()
    data.curriculum.observe(16, 16)
    assert data.state_dict()["level"]["level"] == 2  # trained on
    trainer.state.status = "interrupted"
    assert trainer.interrupted
    saved = data.state_dict()
    assert (saved["samples"], saved["level"]["level"]) == (4, 1)


def test_groups_that_are_replaced_still_count(monkeypatch):
    """All answers are right, so every group is replaced if it can be; the rate is that of the groups before."""
    seen, _ = fit(plan={"resample_rounds": 1}, reward=lambda *, completions, hard, **_: [1.0] * len(completions))
    assert [int(prompts[0][0]) for prompts in seen.prompts] == [0, 1, 2, 3, 3, 3, 3, 3]


class Diary(GRPOModule):
    folder = None

    def collect(self, prompts, *args, **settings):
        rows = super().collect(prompts, *args, **settings)
        self.diary = [*getattr(self, "diary", []), prompts["prompts"]]
        return rows

    def on_fit_end(self):
        torch.save(self.diary, self.folder / f"{self.global_rank}.pt")


def test_ranks_move_together_by_the_rate_of_all(tmp_path, monkeypatch):
    """Prompts with an even number are all right, others never: each rank alone would go another way."""

    def uneven(*, completions, prompts, **columns):
        return [float(int(prompt[1]) < 6) for prompt in prompts]

    monkeypatch.setattr(Diary, "folder", tmp_path)
    data = PromptDataModule(Curriculum(LEVELS, **{**RULE, "window": 32}), 0, tokenizer=TOKENIZER, batch_size=8)
    two = {"devices": 2, "strategy": DDPStrategy(start_method="fork", process_group_backend="gloo")}
    fit(kind=Diary, reward=uneven, data=data, steps=8, **two)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    levels = [[{int(prompt[0]) for prompt in prompts} for prompts in rank] for rank in ranks]
    assert levels[0] == levels[1] == [{0}, {1}, {2}, {3}]  # six of the eight prompts are right in each epoch


def test_a_fraction_is_held_out_of_every_level():
    data = PromptDataModule(Curriculum(LEVELS), 0.25, tokenizer=TOKENIZER, batch_size=4)
    data.setup()
    sides = [{record["prompt"] for record in source.records()} for source in data._sources]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 32
    assert all({prompt[0] for prompt in side} == set("0123") for side in sides)
    assert data.curriculum is not None


def test_other_levels_are_other_data_and_the_part_is_plain_data(tmp_path):
    rule = Curriculum(LEVELS, **RULE)
    assert Part.from_dict(rule.to_dict()).window == 16
    _, trainer = fit(steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = PromptDataModule(Curriculum(LEVELS[:3], **RULE), 0, tokenizer=TOKENIZER, batch_size=4)
    with pytest.raises(FingerprintError):
        fit(tmp_path / "last.ckpt", data=other, steps=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": ()}, "give at least one"),
        ({"start": 4}, "start=4 must be the index of one of the 4 levels"),
        ({"start": -1}, "start=-1"),
        ({"raise_at": 0.2, "lower_at": 0.2}, "must be below raise_at"),
        ({"raise_at": 1.5}, "from 0 to 1"),
        ({"window": 0}, "window=0"),
    ],
)
def test_impossible_rules_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Curriculum(**{"levels": LEVELS, **settings})
