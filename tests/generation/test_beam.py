"""Beam search against trying every answer there is, and transformers' own."""

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Beam, Generator, Sampling, beam_search
from lightning_lm.models import Attention, Layer, Normal, TransformerConfig
from lightning_lm.models.huggingface.transformers_model import TransformersModel


def model_of(vocab, seed=0):
    torch.manual_seed(seed)
    layers = Layer(mixer=Attention(num_heads=2))
    config = TransformerConfig(vocab_size=vocab, d_model=16, num_layers=2, layers=layers, init=Normal(std=0.4))
    return config.build().eval()


@torch.no_grad()
def every_answer(model, prompt, *, length, stop_ids, penalty):
    """All answers that end, best first."""
    vocab, found = model.config.vocab_size, []
    for n in range(1, length + 1):
        for ids in itertools.product(range(vocab), repeat=n):
            ended = ids[-1] in stop_ids or n == length
            if not ended or any(token in stop_ids for token in ids[:-1]):
                continue
            logprobs = model(torch.tensor([[*prompt, *ids]])).double().log_softmax(-1)[0, len(prompt) - 1 :]
            total = sum(logprobs[i, token].item() for i, token in enumerate(ids))
            found.append(Beam(total / n**penalty, ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("stop_ids", [(), (2,)])
def test_a_beam_wide_enough_finds_the_best_of_all(penalty, stop_ids):
    model, prompt = model_of(3), [0, 1]
    best = every_answer(model, prompt, length=4, stop_ids=stop_ids, penalty=penalty)[:27]
    (beams,) = beam_search(model, [prompt], num_beams=27, max_new_tokens=4, stop_ids=stop_ids, length_penalty=penalty)
    assert [beam.token_ids for beam in beams] == [beam.token_ids for beam in best]
    assert [beam.score for beam in beams] == pytest.approx([beam.score for beam in best], abs=1e-5)


def test_one_beam_without_a_length_penalty_is_greedy_decoding():
    model, prompts = model_of(40), [[3, 4, 5], [7]]
    greedy = Generator(model).generate(prompts, sampling=Sampling(temperature=0), max_new_tokens=12, stop_ids=range(9))
    beams = beam_search(model, prompts, num_beams=1, max_new_tokens=12, stop_ids=range(9), length_penalty=0)
    assert [beam.token_ids for (beam,) in beams] == [completion.token_ids for completion in greedy]


def test_prompts_of_a_batch_do_not_touch_each_other():
    model, prompts = model_of(20), [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6]]
    options = {"num_beams": 3, "max_new_tokens": 10, "stop_ids": [0, 5]}
    together = beam_search(model, prompts, **options)
    for beams, prompt in zip(together, prompts, strict=True):
        (alone,) = beam_search(model, [prompt], **options)
        assert [beam.token_ids for beam in beams] == [beam.token_ids for beam in alone]
        assert beams == sorted(beams, reverse=True)
        assert len(beams) == 3


def test_equals_transformers():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        eos_token_id=4,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    theirs = model.generate(
        torch.tensor([[5, 6, 7]]), num_beams=4, max_new_tokens=10, do_sample=False, early_stopping="never"
    )[0, 3:].tolist()
    (beams,) = beam_search(TransformersModel(model), [[5, 6, 7]], num_beams=4, max_new_tokens=10, stop_ids=[4])
    assert list(beams[0].token_ids) == theirs


def test_more_beams_than_answers():
    (beams,) = beam_search(model_of(3), [[0]], num_beams=10, max_new_tokens=1)
    assert len(beams) == 3


def test_no_prompts():
    assert beam_search(model_of(3), []) == []


@pytest.mark.parametrize(
    "wrong", [{"num_beams": 0}, {"max_new_tokens": 0}, {"length_penalty": -1.0}, {"prompts": [[]]}, {"prompts": [[9]]}]
)
def test_what_cannot_work_is_refused(wrong):
    with pytest.raises(ConfigurationError):
        beam_search(model_of(3), **{"prompts": [[0]], **wrong})


def test_logits_without_a_number_are_refused():
    with pytest.raises(ConfigurationError, match="NaN"):
        beam_search(lambda ids: torch.full((*ids.shape, 4), math.nan), [[0]])
