"""The table shows what was answered, earned and learned from."""

import io
import math

import numpy as np
import pytest
import rich
import torch
from rich.console import Console

from lightning_lm.callbacks import Completions
from lightning_lm.data import ReverseDigits
from lightning_lm.datamodules import PromptDataModule
from lightning_lm.errors import ConfigurationError
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import GRPOModule, RolloutPlan
from lightning_lm.tokenizers import CharacterTokenizer


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), width=120, color_system=None)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return console


def ones(*, completions, **columns):
    return [float(completion.count("1")) for completion in completions]


def sometimes(*, prompts, completions, **columns):
    return [None if "1" in prompt else 0.25 for prompt in prompts]


def module_of(*rewards, **plan):
    torch.manual_seed(0)
    layers = Layer(mixer=Attention(num_heads=2))
    model = TransformerConfig(d_model=16, num_layers=1, layers=layers, context_length=16)
    return GRPOModule(model, rewards=rewards, plan=RolloutPlan(samples_per_prompt=6, max_new_tokens=5, **plan))


def fit(trainer_with, module, *callbacks, **settings):
    tokenizer = CharacterTokenizer("0123456789=")
    data = PromptDataModule(ReverseDigits(num_examples=12), 0, tokenizer=tokenizer, batch_size=4)
    trainer_with(*callbacks, max_epochs=-1, **settings).fit(module, data)


def test_the_widest_group_is_shown_from_its_best_to_its_worst(trainer_with, record_of, console):
    record, module = record_of(), module_of(ones)
    fit(trainer_with, module, Completions(completions=3), logger=record, max_steps=1, log_every_n_steps=1)
    rollout, rows = module.last_rollout
    spread = np.ptp(rollout.groups, axis=1)
    group = int(spread.argmax())
    ((tag, text, step),) = record.texts
    assert (tag, step) == ("completions", 1)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert cells[0] == ["prompt", "answer", "ones", "advantage"]
    order = sorted(range(6), key=lambda sample: -rollout.groups[group, sample])
    for line, sample in zip(cells[2:], [*order[:2], order[-1]], strict=True):
        place = group * 6 + sample
        assert line[:2] == [rollout.prompts["prompts"][group], rollout.completions[place].text]
        assert float(line[2]) == rollout.groups[group, sample]
        assert math.isclose(float(line[3]), rows["advantages"][place], rel_tol=5e-3, abs_tol=5e-4)
    shown = console.file.getvalue()
    assert "completions at step 1" in shown
    assert rollout.prompts["prompts"][group] in shown


def test_a_reward_that_does_not_apply_and_the_weighted_sum(trainer_with, record_of, console):
    record = record_of()
    module = module_of(ones, sometimes, reward_weights=(1.0, 2.0))
    table = Completions(prompts=4, completions=1)
    fit(trainer_with, module, table, logger=record, max_steps=1, log_every_n_steps=1)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in record.texts[0][1].splitlines()]
    assert lines[0] == ["prompt", "answer", "ones", "sometimes", "reward", "advantage"]
    assert len(lines) == 2 + 4
    for prompt, _, first, second, total, _ in lines[2:]:
        assert second == ("-" if "1" in prompt else "0.25")
        assert float(total) == float(first) + (0 if "1" in prompt else 0.5)


def test_it_comes_as_often_as_asked(trainer_with, record_of, console):
    record = record_of()
    fit(trainer_with, module_of(ones), Completions(every_n_steps=2), logger=record, max_steps=5)
    assert [step for _, _, step in record.texts] == [2, 4]


def test_what_cannot_work_is_refused(trainer_with, foreign_module, loader_of, batches_of):
    with pytest.raises(ConfigurationError, match="completions=0"):
        Completions(completions=0)
    with pytest.raises(ConfigurationError, match="ForeignModule makes none"):
        trainer_with(Completions(), max_epochs=1).fit(foreign_module(), loader_of(batches_of([(2, 9)])))
