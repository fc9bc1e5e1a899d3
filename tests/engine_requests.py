"""Tiny models and requests for tests of the engine without HTTP."""

import threading

import torch

from lightning_lm.generation import Sampling
from lightning_lm.generation.decoding_loop import StopConditions
from lightning_lm.models import GLU, Attention, Layer, Rope, TransformerConfig
from lightning_lm.serving import GenerationRequest

GREEDY = Sampling(temperature=0)


class Letters:
    """A tokenizer of the letters a to z, without an end of sequence."""

    vocab_size, eos_id, bos_id, special_tokens = 26, None, None, {}

    def encode(self, text, *, allow_special=False):
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


def tiny_model(seed=0, **settings):
    torch.manual_seed(seed)
    attention = Attention(num_heads=4, num_kv_heads=2, rope=Rope(), **settings.pop("attention", {}))
    config = TransformerConfig(
        vocab_size=30, d_model=32, num_layers=2, context_length=settings.pop("context_length", 96),
        layers=Layer(mixer=attention, ffn=GLU()), **settings,
    )  # fmt: skip
    model = config.build()
    for weight in model.parameters():  # large enough that greedy completions do not repeat one token
        torch.nn.init.normal_(weight, std=0.4)
    return model


def requests_and_results(cases):
    """Return requests, and for each a list that is filled with its updates and an event for the last of them."""
    made = []
    for case in cases:
        updates, done = [], threading.Event()

        def deliver(update, updates=updates, done=done):
            updates.append(update)
            if update.is_last:
                done.set()

        most = case.pop("max_new_tokens", 8)
        ends = StopConditions(most, None, frozenset(case.pop("stop_ids", ())))
        request = GenerationRequest(deliver=deliver, ends=ends, **case)
        made.append((request, updates, done))
    return made


def run(engine, cases):
    made = requests_and_results(cases)
    for request, _, _ in made:
        engine.submit(request)
    for _, _, done in made:
        assert done.wait(30)
    return [updates for _, updates, _ in made]


def ids_of(updates):
    return tuple(token for update in updates for token in update.token_ids)


class OnlyLogits(torch.nn.Module):
    """A model without a cache, as a user may have one."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids):
        return self.inner(input_ids)
