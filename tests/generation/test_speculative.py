"""Speculative decoding says what the large model alone would say: the same text, or the same distribution."""

import pytest
import torch
from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Generator, Sampling, Speculation
from lightning_lm.generation.forward import CachedForward, PrefixForward
from lightning_lm.generation.speculative import DraftLength
from lightning_lm.models import Attention, Layer, LearnedPositions, Normal, TransformerConfig

GREEDY = Sampling(temperature=0)
CHI_SQUARE_999 = {15: 37.70, 26: 54.05}
"""Upper 0.1 % points of the chi-square distribution by degrees of freedom (any statistics table)."""


class Chain(nn.Module):
    """Logits of the next token depend on the last one only."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.passes = 0
        self.rows = []

    def forward(self, input_ids):
        self.passes += 1
        self.rows.append(len(input_ids))
        return self.table[input_ids]


def chain(vocab, seed, scale=1.0):
    return Chain(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)) * scale)


def model_of(seed=0, *, mixer=None, std=0.3, **options):
    torch.manual_seed(seed)
    layers = Layer(mixer=mixer or Attention(num_heads=4, num_kv_heads=2))
    config = TransformerConfig(
        vocab_size=61, d_model=32, num_layers=2, context_length=64, layers=layers, init=Normal(std=std), **options
    )
    return config.build().eval()


def near(model, noise):
    """A model that agrees with another most of the time."""
    draft = model.config.build().eval()
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: value + noise * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }
    draft.load_state_dict(weights)
    return draft


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 61, (n,), generator=generator).tolist() for n in lengths]


class TestDistribution:
    @pytest.mark.parametrize(("batch_size", "num_tokens"), [(1, 2), (3, 3)])
    def test_of_three_tokens_is_that_of_the_large_model(self, batch_size, num_tokens):
        model, draft, samples = chain(3, seed=0), chain(3, seed=1), 900
        generator = Generator(model, batch_size=batch_size, speculation=Speculation(draft=draft, num_tokens=num_tokens))
        answers = generator.generate([[2]], sampling=Sampling(seed=3), max_new_tokens=4, num_samples=samples)
        ids = torch.tensor([answer.token_ids[1:] for answer in answers])
        observed = (ids @ torch.tensor([9, 3, 1])).bincount(minlength=27).double()
        transition = model.table.double().softmax(-1)
        second = transition[2] @ transition
        expected = (second[:, None, None] * transition[:, :, None] * transition[None]).flatten() * samples
        assert ((observed - expected) ** 2 / expected).sum() < CHI_SQUARE_999[26]

    def test_of_a_truncated_distribution(self):
        model, draft, samples = chain(8, seed=0), chain(8, seed=1), 1500
        sampling = Sampling(seed=3, temperature=0.7, top_k=4)
        generator = Generator(model, batch_size=2, speculation=Speculation(draft=draft, num_tokens=2))
        answers = generator.generate([[2]], sampling=sampling, max_new_tokens=2, num_samples=samples)
        transition = sampling.truncate(model.table).double().softmax(-1)
        expected = transition[2] @ transition * samples
        observed = torch.tensor([answer.token_ids[1] for answer in answers]).bincount(minlength=8).double()
        possible = expected > 0
        assert (observed[~possible] == 0).all()
        assert ((observed - expected) ** 2 / expected)[possible].sum() < CHI_SQUARE_999[15]

    def test_logprobs_are_those_of_the_large_model(self):
        model, draft = chain(8, seed=0), chain(8, seed=1)
        (answer,) = Generator(model, speculation=Speculation(draft=draft)).generate(
            [[2]], sampling=Sampling(seed=3), max_new_tokens=9, logprobs=True
        )
        text = (2, *answer.token_ids)
        logprobs = model.table.log_softmax(-1)
        expected = [logprobs[text[i], text[i + 1]].item() for i in range(9)]
        assert answer.logprobs == pytest.approx(expected, abs=1e-6)


def test_a_batch_on_a_cpu_drafts_less_than_one_row():
    """A pass over 8 rows there costs what 1 row does, a pass over 16 rows half as much again."""

    def best(rate: float, rows: int, device_type: str) -> int:
        length = DraftLength(4, device_type)
        length.note(int(1000 * rate), 1000)
        return length.best(rows)

    assert best(0.5, 8, "cpu") == 0
    assert best(0.5, 1, "cpu") == best(0.5, 8, "cuda") >= 1
    assert best(0.8, 8, "cpu") >= 2


class TestGreedy:
    @pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
    @pytest.mark.parametrize("lengths", [(9,), (3, 23, 1, 12)])
    def test_is_the_same_text(self, lengths, noise):
        model, prompts = model_of(), prompts_of(*lengths)
        options = {"sampling": GREEDY, "max_new_tokens": 20, "stop_ids": range(3), "logprobs": True}
        expected = Generator(model).generate(prompts, **options)
        generator = Generator(model, speculation=Speculation(draft=near(model, noise), num_tokens=3))
        for answer, wanted in zip(generator.generate(prompts, **options), expected, strict=True):
            assert answer.token_ids == wanted.token_ids
            assert answer.finish_reason == wanted.finish_reason
            assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 9])
    def test_any_number_of_tokens_even_all_learned_positions(self, max_new_tokens):
        model = model_of(mixer=Attention(num_heads=4, rope=None), positions=LearnedPositions())
        prompts = prompts_of(65 - max_new_tokens, 30)
        options = {"sampling": GREEDY, "max_new_tokens": max_new_tokens}
        generator = Generator(model, speculation=Speculation(draft=near(model, 0.02)))
        assert generator.generate(prompts, **options) == Generator(model).generate(prompts, **options)

    def test_a_good_draft_saves_passes(self):
        model, draft = chain(8, seed=0, scale=3.0), chain(8, seed=0, scale=3.0)
        generator = Generator(model, speculation=Speculation(draft=draft, num_tokens=4))
        (answer,) = generator.generate([[2]], sampling=GREEDY, max_new_tokens=20)
        assert len(answer.token_ids) == 20
        assert model.passes == 1 + 1 + 15 / 5  # the prompt; three drafts, as not all are expected to be kept; four each

    def test_a_row_does_not_wait_for_one_that_keeps_nothing(self):
        table = torch.eye(8).roll(1, 1)  # 0 1 2 ... 7 0
        table[4:, 4:] = torch.eye(4).roll(1, 1)
        table[:4, :4] = torch.eye(4).roll(1, 1)
        worse = table.clone()
        worse[4:] = worse[4:].roll(1, 1)
        model, draft = Chain(table), Chain(worse)
        generator = Generator(model, speculation=Speculation(draft=draft, num_tokens=4))
        answers = generator.generate([[0], [4]], sampling=GREEDY, max_new_tokens=21)
        assert answers == Generator(Chain(table)).generate([[0], [4]], sampling=GREEDY, max_new_tokens=21)
        assert model.rows.index(1) <= 14  # passes until the first row has left; in step with the other it takes 21

    def test_a_bad_draft_is_given_up(self):
        model, draft = chain(8, seed=0), Chain(-chain(8, seed=0).table)  # which likes best what is least likely
        generator = Generator(model, speculation=Speculation(draft=draft, num_tokens=4))
        (answer,) = generator.generate([[2]], sampling=GREEDY, max_new_tokens=129)
        assert answer == Generator(model).generate([[2]], sampling=GREEDY, max_new_tokens=129)[0]
        assert 2 <= draft.passes <= 0.05 * 129 / 0.2  # of a fifth of a pass each
        again = draft.passes
        generator.generate([[2]], sampling=GREEDY, max_new_tokens=129)
        assert draft.passes == 2 * again

    def test_a_middling_draft_is_asked_for_less(self):
        lengths = []
        for rate in (1.0, 0.8, 0.6, 0.2):
            length = DraftLength(8)
            for _ in range(100):
                length.note(round(100 * rate), 100)
            lengths.append(length.best())
        assert lengths[0] == 8
        assert sorted(lengths, reverse=True) == lengths
        assert lengths[-1] == 0

    def test_models_without_a_cache(self):
        model = model_of(mixer=Attention(num_heads=4, window=4))
        whole = lambda ids: model(ids)  # noqa: E731
        generator = Generator(whole, speculation=Speculation(draft=whole))
        options = {"sampling": GREEDY, "max_new_tokens": 15}
        assert generator.generate(prompts_of(20, 3), **options) == Generator(model).generate(
            prompts_of(20, 3), **options
        )


MIXERS = {
    "grouped": Attention(num_heads=4, num_kv_heads=2),
    "wide window": Attention(num_heads=4, window=16),
    "soft cap": Attention(num_heads=4, softcap=5.0, rope=None),
}
SAME_COUNTS = [(4, [3, 3, 3]), (1, [0, 0, 0]), (5, [5, 5, 5]), (4, [1, 1, 1]), (2, [0, 0, 0])]
OWN_COUNTS = [(4, [3, 0, 4]), (1, [0, 0, 0]), (5, [0, 5, 2]), (1, [1, 1, 0]), (4, [0, 0, 4]), (3, [0, 0, 0])]


@pytest.mark.parametrize("lengths", [(3, 12, 7), (6, 6, 6)], ids=["ragged", "even"])
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("counts", [SAME_COUNTS, OWN_COUNTS], ids=["same", "own"])
@torch.inference_mode()
def test_going_back_is_as_if_nothing_had_been_read(mixer, counts, lengths):
    positions = LearnedPositions() if mixer.rope is None else None
    model, prompts = model_of(mixer=mixer, positions=positions), prompts_of(*lengths)
    cached, whole = CachedForward(model, prompts, 18), PrefixForward(lambda ids: model(ids), prompts, 18)
    generator = torch.Generator().manual_seed(2)
    torch.testing.assert_close(cached.prefill(), whole.prefill(), rtol=1e-5, atol=1e-5)
    rows = torch.arange(3)
    for step, (new, back) in enumerate(counts):
        ids = torch.randint(0, 61, (len(rows), new), generator=generator)
        torch.testing.assert_close(cached.extend(ids), whole.extend(ids), rtol=1e-5, atol=1e-5)
        for forward in (cached, whole):
            forward.rewind(torch.tensor(back)[rows])
        if step == 3:  # the row that was ahead of all others leaves
            rows = torch.tensor([2, 0])
            for forward in (cached, whole):
                forward.select(rows)


def test_memory_of_a_row_ends_where_its_text_does():
    """A row that is far ahead leaves, and the others may use every column up to the last."""
    model, prompts = model_of(), prompts_of(4, 4)
    options = {"sampling": GREEDY, "max_new_tokens": 20}
    draft = near(model, 0.1)
    generator = Generator(model, speculation=Speculation(draft=draft, num_tokens=3))
    assert generator.generate(prompts, **options) == Generator(model).generate(prompts, **options)
    cached = CachedForward(model, prompts, 6)
    with torch.inference_mode():
        cached.prefill()
        cached.extend(torch.ones(2, 5, dtype=torch.int64))
        cached.rewind(torch.tensor([0, 4]))
        cached.select(torch.tensor([1]))
        assert cached.extend(torch.ones(1, 4, dtype=torch.int64)).isfinite().all()


class TestRefusals:
    def generate(self, model, draft, **options):
        generator = Generator(model, speculation=Speculation(draft=draft, **options.pop("speculation", {})))
        generator.generate([[1, 2]], **{"sampling": GREEDY, "max_new_tokens": 30, **options})

    def test_penalties(self):
        with pytest.raises(ConfigurationError, match="Penalties"):
            self.generate(chain(8, 0), chain(8, 1), sampling=Sampling(presence_penalty=1.0))

    def test_another_vocabulary(self):
        with pytest.raises(ConfigurationError, match=r"8 token ids and its draft 9"):
            self.generate(chain(8, 0), chain(9, 1))

    def test_a_window_that_has_forgotten(self):
        model = model_of(mixer=Attention(num_heads=4, window=4))
        with pytest.raises(ConfigurationError, match="window"):
            self.generate(model, model_of(seed=1))

    def test_nothing_drafted(self):
        with pytest.raises(ConfigurationError, match="num_tokens=0"):
            Speculation(draft=chain(8, 0), num_tokens=0)

    def test_steps_that_ranks_agree_on(self):
        with pytest.raises(ConfigurationError, match="agree"):
            Generator(chain(8, 0), steps_agree=bool, speculation=Speculation(draft=chain(8, 0)))
