"""Sampling and reinforcement learning from a model that ranks share, against one process."""

import pytest
import torch
from lightning.pytorch import Callback
from split_runs import Rows, model_config, trainer_for

from lightning_lm.callbacks import SampleText
from lightning_lm.data import ReverseDigits
from lightning_lm.datamodules import PromptDataModule
from lightning_lm.functional import KLPenalty
from lightning_lm.generation import Sampling
from lightning_lm.modules import GRPOModule, Objective, PretrainModule, RolloutPlan, Validation
from lightning_lm.optim import AdamW, Constant
from lightning_lm.strategies import TensorParallelStrategy
from lightning_lm.tokenizers import CharacterTokenizer

TP2, SP2, FSDP2 = (
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 2, "sequence_parallel": True},
    {"tensor_parallel_size": 1},
)
TOKENIZER = CharacterTokenizer("0123456789=")


def strategy_of(settings):
    return settings if isinstance(settings, str) else TensorParallelStrategy(**settings)


class Keep(SampleText):
    def _complete(self, trainer, module):
        self.texts = super()._complete(trainer, module)
        return self.texts


def samples(settings):
    torch.manual_seed(1)
    config = model_config(TOKENIZER.vocab_size)
    module = PretrainModule(config, optimizer=AdamW(lr=1e-2), schedule=Constant())
    keep = Keep(["12=", "3", "4567"], max_new_tokens=8, tokenizer=TOKENIZER)
    trainer = trainer_for(strategy_of(settings), callbacks=[keep], max_steps=3)
    trainer.fit(module, Rows(trainer, 3, TOKENIZER.vocab_size), Rows(trainer, 1, TOKENIZER.vocab_size))
    return keep.texts


@pytest.mark.parametrize("settings", [TP2, SP2, FSDP2], ids=["tp2", "tp2 sp", "fsdp2"])
def test_samples_are_those_of_one_process(ranks, settings):
    assert ranks(2).run(samples, settings) == [samples("auto")] * 2


def share_of_ones(*, completions, **columns):
    return [completion.count("1") / 5 for completion in completions]


class Steps(Callback):
    def __init__(self):
        self.rollouts, self.losses = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rollout, _ = module.last_rollout
        self.rollouts.append([answer.token_ids for answer in rollout.completions])
        self.losses.append(module.last_metrics["train/loss"])


def grpo(settings):
    torch.manual_seed(1)
    config = model_config(TOKENIZER.vocab_size)
    plan = RolloutPlan(
        samples_per_prompt=4, max_new_tokens=5, validation=Validation(sampling=Sampling(temperature=0.7))
    )
    module = GRPOModule(
        config,
        rewards=[share_of_ones],
        plan=plan,
        objective=Objective(kl=KLPenalty(coefficient=0.1)),  # with a frozen copy of the policy beside it
        optimizer=AdamW(lr=1e-2, weight_decay=0.0),
        schedule=Constant(),
    )
    data = PromptDataModule(
        ReverseDigits(num_examples=12, num_digits=3),
        ReverseDigits(num_examples=6, num_digits=3, held_out=True),
        tokenizer=TOKENIZER,
        batch_size=4,
    )
    steps = Steps()
    trainer = trainer_for(strategy_of(settings), callbacks=[steps], max_steps=2)
    trainer.fit(module, datamodule=data)
    weights = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in module.model.state_dict().items()}
    return steps.rollouts, steps.losses, weights


def assert_same_course(found, expected):
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    for name, weight in expected[2].items():
        torch.testing.assert_close(found[2][name], weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [TP2, SP2], ids=["tp2", "tp2 sp"])
def test_grpo_where_ranks_share_each_matrix(ranks, settings):
    expected = grpo("auto")
    assert len({len(answer) for answer in expected[0][0]}) > 1  # ragged
    for found in ranks(2).run(grpo, settings):
        assert_same_course(found, expected)


def test_grpo_sharded_over_prompts(ranks):
    """Answers follow from rank and step, so it is compared with two ranks that each hold the whole model."""
    for found, expected in zip(ranks(2).run(grpo, FSDP2), ranks(2).run(grpo, "ddp"), strict=True):
        assert_same_course(found, expected)
