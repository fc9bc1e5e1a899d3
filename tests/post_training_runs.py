"""Short runs of post-training on one process or on many, whose answers follow from the prompts alone."""

import dataclasses
import random
from typing import Any

import torch
from lightning.pytorch import LightningModule
from split_runs import STRATEGIES, trainer_for, weights_of

from lightning_lm.callbacks import Adapters, LoRA
from lightning_lm.data import EncodedPair, PairStream, PreferencePairs, ReverseDigits
from lightning_lm.datamodules import PromptDataModule, UnpairedDataModule
from lightning_lm.distributed import data_rank, data_ranks
from lightning_lm.functional import KLPenalty
from lightning_lm.generation import Backend, Completion
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.modules import (
    AdapterReference,
    CopyReference,
    Critic,
    DPOModule,
    GRPOModule,
    KLReward,
    KTOModule,
    Objective,
    PPOModule,
    RolloutPlan,
)
from lightning_lm.optim import SGD, Constant
from lightning_lm.tokenizers import CharacterTokenizer

__all__ = ["KINDS", "TOKENIZER", "Found", "small_policy", "train"]

TOKENIZER = CharacterTokenizer("0123456789=")
PAIRS = 8
"""Of an optimizer step."""
Found = tuple[dict[str, torch.Tensor], dict[str, float]]
"""Weights at the end, and what was logged last."""


def small_policy() -> TransformerConfig:
    """Return a model with two key heads, for answers in digits."""
    layers = Layer(mixer=Attention(num_heads=4, num_kv_heads=2), ffn=GLU(hidden_size=32))
    return TransformerConfig(
        vocab_size=TOKENIZER.vocab_size, d_model=16, num_layers=2, context_length=16, layers=layers
    )


class Written:
    """Answers of 1, 2 or 7 digits that depend on nothing but the prompt: the same whichever rank asks."""

    def generate(self, prompts, *, sampling, max_new_tokens, stop_ids, num_samples, logprobs):
        return [self.answer(tuple(prompt), sample, stop_ids) for prompt in prompts for sample in range(num_samples)]

    def answer(self, prompt, sample, stop_ids):
        noise = random.Random(f"{prompt} {sample}")
        ids = [noise.randrange(10) for _ in range(noise.choice([1, 2, 2, 7]))]
        ended = len(ids) < 7
        text = "".join(map(str, ids))
        ids += stop_ids if ended else ()
        return Completion(prompt, tuple(ids), text, "stop" if ended else "length", (-2.3,) * len(ids))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenBackend(Backend):
    def build(self, policy):
        return Written()


def ones(*, completions, **columns):
    return [completion.count("1") - 0.1 * len(completion) for completion in completions]


class Pairs:
    """The same pairs of each step, whoever reads them; every rank and micro-batch its own."""

    def __init__(self, trainer: Any, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        generator = torch.Generator().manual_seed(0)

        def ids(longest: int) -> list[int]:
            size = int(torch.randint(1, longest + 1, (1,), generator=generator))
            return torch.randint(10, (size,), generator=generator).tolist()

        self.pairs = PreferencePairs(EncodedPair(ids(3), ids(5), ids(5), 0.0, False) for _ in range(steps * PAIRS))

    def __len__(self) -> int:
        return self.steps * self.trainer.accumulate_grad_batches

    def __iter__(self):
        stream = PairStream(self.pairs, shuffle=False)
        parts = data_ranks(self.trainer) * self.trainer.accumulate_grad_batches
        for step in range(self.steps):
            for micro_batch in range(self.trainer.accumulate_grad_batches):
                part = micro_batch * data_ranks(self.trainer) + data_rank(self.trainer)
                numbers = torch.arange(step * PAIRS, (step + 1) * PAIRS).chunk(parts)[part]
                yield {name: torch.from_numpy(values) for name, values in stream.batch(numbers.numpy()).items()}


def _policy(kind: type[LightningModule], **settings: Any) -> LightningModule:
    plan = RolloutPlan(samples_per_prompt=4, max_new_tokens=7, mask_truncated=True, backend=WrittenBackend())
    return kind(
        small_policy(),
        rewards=[ones],
        plan=plan,
        optimizer=SGD(lr=0.1),
        schedule=Constant(),
        **settings,
    )


def _dpo(lr: float = 0.5, **settings: Any) -> LightningModule:
    return DPOModule(small_policy(), optimizer=SGD(lr=lr), schedule=Constant(), **settings)


KINDS = {
    "grpo": lambda: _policy(GRPOModule, objective=Objective(kl=KLPenalty(coefficient=0.3))),
    "ppo": lambda: _policy(
        PPOModule, critic=Critic(lr_scale=1.0), kl=KLReward(coefficient=0.3, target=0.01, horizon=10)
    ),
    "dpo": lambda: _dpo(reference=CopyReference()),
    "kto": lambda: KTOModule(small_policy(), optimizer=SGD(lr=2.0), schedule=Constant()),
    "dpo with adapters": lambda: _dpo(lr=20.0, reference=AdapterReference()),
}


def train(kind: str, strategy: str, *, steps: int = 3, accumulate: int = 1) -> Found:
    """Train a module of a kind under a strategy.

    Args:
        kind: Of `KINDS`.
        strategy: Of `split_runs.STRATEGIES`.
        steps: Optimizer steps.
        accumulate: Micro-batches of a step.
    """
    callbacks = [LoRA(Adapters(rank=2))] if "adapters" in kind else []
    trainer = trainer_for(
        STRATEGIES[strategy](),
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    torch.manual_seed(1)
    module = KINDS[kind]()
    if kind.startswith("dpo"):
        trainer.fit(module, Pairs(trainer, steps))
    else:
        trainer.fit(module, datamodule=_unpaired() if kind == "kto" else _prompts())
    return weights_of(module), dict(module.last_metrics)


def _unpaired() -> UnpairedDataModule:
    noise = random.Random(0)

    def digits(longest: int) -> str:
        return "".join(noise.choices("0123456789", k=noise.randint(1, longest)))

    train = [{"prompt": f"{digits(3)}=", "completion": digits(5), "label": number % 3 == 0} for number in range(24)]
    return UnpairedDataModule(train, tokenizer=TOKENIZER, batch_size=PAIRS)


def _prompts() -> PromptDataModule:
    train = ReverseDigits(num_examples=12, num_digits=3)
    held_out = ReverseDigits(num_examples=6, num_digits=3, held_out=True)
    return PromptDataModule(train, held_out, tokenizer=TOKENIZER, batch_size=4)
