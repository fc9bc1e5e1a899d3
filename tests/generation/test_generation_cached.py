"""Cached generation of the real transformer, in all its forms, against running it over the whole prefix."""

import pytest
import torch

from lightning_lm.generation import Generator, Sampling, forward
from lightning_lm.generation.forward import CachedForward, PrefixForward
from lightning_lm.models import (
    MLP,
    ALiBi,
    Attention,
    LatentAttention,
    Layer,
    LayerNorm,
    LearnedPositions,
    LinearAttention,
    Normal,
    Parallel,
    SinusoidalPositions,
    TransformerConfig,
)

VOCAB = 61
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
"""float32 sums of some hundred terms in another order."""

VARIANTS = {
    "full": Layer(mixer=Attention(num_heads=4)),
    "grouped": Layer(mixer=Attention(num_heads=4, num_kv_heads=2, qk_norm="head")),
    "multi_query": Layer(mixer=Attention(num_heads=4, num_kv_heads=1)),
    "window": Layer(mixer=Attention(num_heads=4, window=5)),
    "hybrid": (Layer(mixer=Attention(num_heads=4, window=4)), Layer(mixer=Attention(num_heads=4, softcap=5.0))),
    "learned": Layer(mixer=Attention(num_heads=4, rope=None, bias="all"), ffn=MLP()),
    "sinusoidal": Layer(mixer=Attention(num_heads=4, rope=None)),
}
OTHERS = {
    "alibi": Layer(mixer=Attention(num_heads=4, rope=None)),
    "latent": Layer(mixer=LatentAttention(num_heads=4, kv_rank=8, nope_dim=8, rope_dim=4, v_dim=8)),
    "parallel": Layer(mixer=Parallel((Attention(num_heads=4), Attention(num_heads=2)))),
    "recurrent": Layer(mixer=LinearAttention(num_heads=4)),
}
OPTIONS = {
    "alibi": {"positions": ALiBi(num_heads=4)},
    "learned": {"positions": LearnedPositions(), "norm": LayerNorm(), "tie_embeddings": True},
    "sinusoidal": {"positions": SinusoidalPositions(), "logit_softcap": 3.0},
}


def model_of(variant):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=VOCAB,
        d_model=32,
        num_layers=2,
        context_length=64,
        layers=(VARIANTS | OTHERS)[variant],
        init=Normal(std=0.3),
        **OPTIONS.get(variant, {}),
    )
    return config.build().eval()


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def uncached(model):
    return lambda ids: model(ids)


@pytest.fixture(params=[10**6, 3], ids=["together", "in groups"])
def read(request, monkeypatch):
    """How prompts of different lengths are read: with three tokens of padding, or as many as there are."""
    monkeypatch.setattr(forward, "_PASS_COSTS", {"default": request.param})


@pytest.mark.usefixtures("read")
@pytest.mark.parametrize("lengths", [(7,), (7, 7), (3, 23, 1, 12, 22, 2)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_of_the_whole_prefix(variant, lengths):
    model, prompts = model_of(variant), prompts_of(*lengths)
    cached, whole = CachedForward(model, prompts, 16), PrefixForward(uncached(model), prompts, 16)
    torch.testing.assert_close(cached.prefill(), whole.prefill(), **TOLERANCE)
    generator = torch.Generator().manual_seed(2)
    rows = torch.arange(len(prompts))
    for step in range(15):
        ids = torch.randint(0, VOCAB, (len(rows),), generator=generator)
        torch.testing.assert_close(cached.step(ids), whole.step(ids), **TOLERANCE)
        if step in (4, 9) and len(rows) > 1:
            rows = torch.arange(len(rows))[1:]
            cached.select(rows)
            whole.select(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_says_what_each_prompt_gets_alone(variant):
    model, prompts = model_of(variant), prompts_of(3, 23, 1, 12, 23)
    options = {"max_new_tokens": 12, "stop_ids": range(5)}
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, repetition_penalty=1.3, presence_penalty=0.2)):
        together = Generator(model).generate(prompts, sampling=sampling, **options)
        assert together == [Generator(model).generate([p], sampling=sampling, **options)[0] for p in prompts]
        assert together == Generator(uncached(model)).generate(prompts, sampling=sampling, **options)
    assert len({completion.token_ids for completion in together}) > 2


@pytest.mark.parametrize("variant", ["full", "hybrid", "learned"])
def test_sampled_answers_share_a_prefill_and_change_nothing(variant):
    model, prompts = model_of(variant), prompts_of(3, 17, 9)
    options = {"sampling": Sampling(seed=7, top_p=0.9), "max_new_tokens": 15, "num_samples": 4, "stop_ids": range(9)}
    expected = Generator(uncached(model)).generate(prompts, **options)
    assert Generator(model).generate(prompts, **options) == expected
    assert Generator(model, batch_size=5).generate(prompts, **options) == expected


def test_the_whole_context_of_learned_positions_can_be_filled():
    model = model_of("learned")
    (completion,) = Generator(model).generate(prompts_of(60), sampling=Sampling(temperature=0), max_new_tokens=5)
    assert len(completion.token_ids) == 5


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("variant", ["full", "sinusoidal"])
def test_training_goes_on_after_generation(variant, inference_mode):
    """What the model keeps between passes must not come from a mode that knows no gradients."""
    model = model_of(variant).train()
    Generator(model, inference_mode=inference_mode).generate(prompts_of(4), max_new_tokens=4)
    model(torch.tensor(prompts_of(4))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16():
    model = model_of("grouped").bfloat16()
    completions = Generator(model).generate(prompts_of(3, 9), max_new_tokens=8, logprobs=True)
    assert all(value <= 0 for completion in completions for value in completion.logprobs)


class Counted(torch.nn.Module):
    """Counts the tokens of each forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, []
        self.make_cache = model.make_cache

    def forward(self, ids, cache):
        self.passes.append(tuple(ids.shape))
        return self.model(ids, cache=cache)


def test_prompts_of_similar_length_are_read_together():
    model = Counted(model_of("full"))
    prompts = prompts_of(5, 60, 58, 4, 61, 30)
    cached = CachedForward(model, prompts, 2)
    assert model.passes == []
    cached.prefill()
    assert sum(rows * width for rows, width in model.passes) <= sum(map(len, prompts)) + 64 * len(model.passes)
    assert len(model.passes) == 2
    equal = CachedForward(model, [prompts[1]] * 2, 2)
    equal.prefill()
    assert model.passes[2:] == [(2, 60)]


EXAMPLES = prompts_of(20)[0]
"""What prompts begin with."""


def behind_examples(*lengths):
    return [EXAMPLES + prompt for prompt in prompts_of(*lengths)]


@pytest.mark.usefixtures("read")
@pytest.mark.parametrize("lengths", [(7, 7, 7, 7, 7), (3, 23, 1, 12, 22, 2)])
@pytest.mark.parametrize("variant", [*VARIANTS, *OTHERS])
@torch.no_grad()
def test_prompts_that_begin_alike_get_the_logits_of_whole_prompts(variant, lengths, monkeypatch):
    monkeypatch.setitem(forward._PASS_COSTS, "cpu", min(forward._PASS_COSTS["default"], 64))
    model, prompts = model_of(variant), behind_examples(*lengths)
    cached, whole = CachedForward(model, prompts, 8), PrefixForward(uncached(model), prompts, 8)
    torch.testing.assert_close(cached.prefill(), whole.prefill(), **TOLERANCE)
    rows = torch.arange(len(prompts))
    for step in range(7):
        torch.testing.assert_close(cached.step(rows + step), whole.step(rows + step), **TOLERANCE)
        if step == 3:
            rows = rows[1:]
            cached.select(rows)
            whole.select(rows)


@torch.no_grad()
def test_what_prompts_begin_with_is_read_once():
    model = Counted(model_of("full"))
    CachedForward(model, behind_examples(5, 9, 7, 6, 9), 2).prefill()
    assert model.passes == [(1, 20), (5, 9)]
    model.passes.clear()
    CachedForward(model, behind_examples(5, 9), 2).prefill()  # a pass would cost as much as it saves
    assert model.passes == [(2, 29)]


@torch.no_grad()
def test_nan_of_a_token_reaches_no_row_without_it():
    """Padding is a token of the row itself: the mask would hide others, but not their NaN."""
    model = model_of("full")
    whole = PrefixForward(uncached(model), behind_examples(3, 9, 5, 7, 6), 2).prefill()
    model.embed.weight[0] = float("nan")
    torch.testing.assert_close(CachedForward(model, behind_examples(3, 9, 5, 7, 6), 2).prefill(), whole, **TOLERANCE)
    apart = prompts_of(3, 9)
    expected = PrefixForward(uncached(model), apart[1:], 2).prefill()
    torch.testing.assert_close(CachedForward(model, apart, 2).prefill()[1:], expected, **TOLERANCE)
    assert CachedForward(model, apart, 2).prefill().isfinite().all()


@pytest.mark.parametrize("prompts_with", [prompts_of, behind_examples])
@pytest.mark.parametrize("groups_of_others", [1, 3, 7])
@pytest.mark.usefixtures("read")
@torch.no_grad()
def test_ranks_run_equally_many_passes_over_prompts(groups_of_others, prompts_with):
    """As a collective would have it: each call is answered by whether any rank has prompts left."""
    model, prompts, calls = Counted(model_of("full")), prompts_with(3, 23, 1, 12, 22, 2), []

    def any_rank(unfinished):
        calls.append(unfinished)
        return unfinished or len(calls) < groups_of_others

    found = CachedForward(model, prompts, 4, any_rank).prefill()
    own = len(calls) - calls[::-1].index(True) + 1 if True in calls else 1
    assert len(model.passes) == len(calls) == max(own, groups_of_others)
    alone = CachedForward(model, prompts, 4).prefill()
    torch.testing.assert_close(found, alone, **TOLERANCE)
