"""A small task and a model of constants, to test what asks and reports."""

import dataclasses
import math

import torch

from lightning_lm.evals import Completions, Generation, Item, Likelihood, LogLikelihood, Prompt, Shot, Task
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextLetter(Task):
    """Multiple choice: the letter after another."""

    name: str = "next_letter"
    count: int = 12
    shots: int = 2

    @property
    def chance(self):
        return 0.5

    def items(self):
        examples = tuple(Shot(f"After {chr(97 + index)} comes", f" {chr(98 + index)}") for index in range(self.shots))
        return [self._item(index, examples) for index in range(self.count)]

    def _item(self, index, examples):
        first = 97 + index % 20
        prompt = Prompt(f"After {chr(first)} comes", examples)
        choices = (f" {chr(first + 1)}", f" {chr(first + 3)}")
        requests = tuple(Likelihood(prompt, choice) for choice in choices)
        return Item(str(index), requests, 0, subject="even" if index % 2 == 0 else "odd", cluster=str(index // 3))

    def score(self, item, answers):
        right = float(answers[item.gold].logprob > answers[1 - item.gold].logprob)
        return {"acc": right, "nats": -answers[item.gold].logprob}

    def aggregate(self, scores):
        means = super().aggregate(scores)
        return {"acc": means["acc"], "perplexity": math.exp(means["nats"])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Echo(Task):
    """Generation: the length of what is written."""

    name: str = "echo"
    count: int = 3

    @property
    def main_metric(self):
        return "length"

    def items(self):
        return [
            Item(str(index), (Generation(Prompt(f"Say {index}"), max_new_tokens=4),), 0) for index in range(self.count)
        ]

    def score(self, item, answers):
        return {"length": float(answers[0].num_tokens[0])}


class ConstantModel:
    """Prefers shorter sums of characters; counts what it is asked."""

    description = {"model": "constant"}  # noqa: RUF012

    def __init__(self, fail_after=math.inf):
        self.asked, self.fail_after = 0, fail_after

    def log_likelihoods(self, requests):
        self._count(len(requests))
        return [LogLikelihood(-float(sum(map(ord, request.continuation)) % 7), 1) for request in requests]

    def generate(self, requests):
        self._count(len(requests))
        return [Completions(("text",), (len(request.prompt.text),)) for request in requests]

    def _count(self, count):
        if self.asked + count > self.fail_after:
            raise ConnectionError("the machine went away")
        self.asked += count


def model(**settings):
    """A transformer of bytes that is not indifferent between tokens."""
    torch.manual_seed(0)
    attention = {key: settings.pop(key) for key in ("window",) if key in settings}
    layers = Layer(mixer=Attention(num_heads=2, **attention), ffn=GLU(hidden_size=32))
    settings = {"vocab_size": 260, "d_model": 16, "num_layers": 2, "layers": layers, "context_length": 512} | settings
    built = TransformerConfig(**settings).build()
    for parameter in built.parameters():  # initial weights make all choices alike
        parameter.data.mul_(4)
    return built
