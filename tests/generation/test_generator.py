"""`Generator` on a Markov chain whose distribution is known, and against transformers' own generation."""

import dataclasses
import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Generator, Sampling
from lightning_lm.generation.slots import supports_slots
from lightning_lm.models import ALiBi, Attention, Layer, TransformerConfig
from lightning_lm.models.huggingface.transformers_model import TransformersModel

GREEDY = Sampling(temperature=0)
CHI_SQUARE_999 = {7: 24.32}
"""Upper 0.1 % point of the chi-square distribution with 7 degrees of freedom (any statistics table)."""


class Letters:
    """A tokenizer of the letters a to y, with z as the end of sequence (id 25)."""

    vocab_size = 26
    eos_id = 25
    bos_id = None

    def encode(self, text, *, allow_special=False):
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


class Chain(nn.Module):
    """Logits of the next token depend on the last one only."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout(0.9)
        self.widths = []

    def forward(self, input_ids):
        self.widths.append(tuple(input_ids.shape))
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.dropout(self.table)[input_ids]


def alphabet():
    """A chain that says the alphabet."""
    return Chain(torch.eye(26).roll(1, dims=1) * 100)


def random_chain(vocab=8, seed=0):
    return Chain(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)))


def tiny_llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def prompts_of(lengths, vocab=97, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def answers(completions):
    return [list(completion.token_ids) for completion in completions]


class TestEnds:
    def test_length(self):
        (completion,) = Generator(alphabet()).generate([[0]], sampling=GREEDY, max_new_tokens=3)
        assert completion.token_ids == (1, 2, 3)
        assert (completion.finish_reason, completion.text, completion.logprobs) == ("length", "", None)

    def test_eos_is_in_the_ids_and_not_in_the_text(self):
        (completion,) = Generator(alphabet(), Letters()).generate(["w"], sampling=GREEDY, max_new_tokens=9)
        assert completion.token_ids == (23, 24, 25)
        assert (completion.finish_reason, completion.text) == ("eos", "xy")

    def test_eos_as_the_first_and_as_the_last_token(self):
        generator = Generator(alphabet(), Letters())
        completions = generator.generate(["y", "w"], sampling=GREEDY, max_new_tokens=3)
        assert [(c.text, c.finish_reason) for c in completions] == [("", "eos"), ("xy", "eos")]

    def test_several_stop_ids(self):
        generator = Generator(alphabet(), Letters())
        completions = generator.generate(["a", "f"], sampling=GREEDY, max_new_tokens=9, stop_ids=[8, 3])
        assert [(c.text, c.finish_reason, c.token_ids[-1]) for c in completions] == [
            ("bc", "stop", 3),
            ("gh", "stop", 8),
        ]

    def test_several_stop_strings(self):
        generator = Generator(alphabet(), Letters())
        completions = generator.generate(["a", "f"], sampling=GREEDY, max_new_tokens=9, stop_strings=["ij", "de"])
        assert [(c.text, c.finish_reason) for c in completions] == [("bc", "stop"), ("gh", "stop")]
        assert answers(completions) == [[1, 2, 3, 4], [6, 7, 8, 9]]

    def test_a_stop_string_counts_in_the_answer_only(self):
        (completion,) = Generator(alphabet(), Letters()).generate(
            ["ab"], sampling=GREEDY, max_new_tokens=3, stop_strings=["bc"]
        )
        assert (completion.text, completion.finish_reason) == ("cde", "length")

    def test_no_prompts_give_no_completions(self):
        assert Generator(alphabet()).generate([]) == []


class TestStream:
    @pytest.mark.parametrize("stop_strings", [(), ("fg",), ("x",)])
    @pytest.mark.parametrize("max_new_tokens", [1, 7, 40])
    def test_joins_to_the_generated_text(self, stop_strings, max_new_tokens):
        generator = Generator(alphabet(), Letters())
        options = {"sampling": GREEDY, "max_new_tokens": max_new_tokens, "stop_strings": stop_strings}
        (completion,) = generator.generate(["a"], **options)
        assert "".join(generator.stream("a", **options)) == completion.text

    def test_sampled_text_is_the_same_for_the_same_seed(self):
        generator = Generator(Chain(torch.zeros(26, 26)), Letters())
        options = {"sampling": Sampling(seed=5), "max_new_tokens": 30}
        assert "".join(generator.stream("a", **options)) == generator.generate(["a"], **options)[0].text

    def test_text_comes_as_it_is_generated(self):
        model = alphabet()
        stream = Generator(model, Letters()).stream("a", sampling=GREEDY, max_new_tokens=9)
        assert [next(stream), next(stream)] == ["b", "c"]
        assert len(model.widths) == 2

    def test_leaving_it_restores_the_model(self):
        model = alphabet().train()
        stream = Generator(model, Letters()).stream("a", sampling=GREEDY)
        next(stream)
        assert torch.is_grad_enabled()
        stream.close()
        assert model.training


class TestDistribution:
    def test_follows_the_chain(self):
        model = random_chain()
        samples = 4000
        completions = Generator(model).generate([[3]], sampling=Sampling(seed=1), max_new_tokens=2, num_samples=samples)
        first = torch.tensor(answers(completions))[:, 0].bincount(minlength=8).double()
        second = torch.tensor(answers(completions))[:, 1].bincount(minlength=8).double()
        transition = model.table.detach().double().softmax(-1)
        for observed, expected in ((first, transition[3] * samples), (second, transition[3] @ transition * samples)):
            assert ((observed - expected) ** 2 / expected).sum() < CHI_SQUARE_999[7]

    def test_logprobs_are_the_models_own_at_the_temperature(self):
        model = random_chain()
        sampling = Sampling(seed=1, temperature=0.5, top_k=3, repetition_penalty=2.0)
        completions = Generator(model).generate(
            [[3], [1, 2]], sampling=sampling, max_new_tokens=6, num_samples=2, logprobs=True, stop_ids=[4]
        )
        log_transition = (model.table.detach().double() / 0.5).log_softmax(-1)
        for completion in completions:
            text = [*completion.prompt_ids, *completion.token_ids]
            expected = [log_transition[a, b].item() for a, b in itertools.pairwise(text)]
            assert completion.logprobs == pytest.approx(expected[len(completion.prompt_ids) - 1 :], abs=1e-5)

    def test_ids_that_only_the_model_knows_are_never_chosen(self):
        model = Chain(torch.zeros(64, 64))
        options = {"max_new_tokens": 200, "logprobs": True}
        for sampling in (Sampling(seed=0), Sampling(seed=0, top_p=0.9, repetition_penalty=1.1), GREEDY):
            (completion,) = Generator(model, Letters()).generate(["a"], sampling=sampling, **options)
            assert max(completion.token_ids) < 26
            assert completion.logprobs == pytest.approx([-math.log(64)] * len(completion.token_ids))


class TestSeeds:
    def test_a_row_does_not_depend_on_the_batch(self):
        generator = Generator(random_chain())
        options = {"sampling": Sampling(seed=4), "max_new_tokens": 12, "stop_ids": [5]}
        together = answers(generator.generate([[0], [1, 2], [3]], **options, num_samples=3))
        assert answers(generator.generate([[0], [1, 2]], **options, num_samples=3)) == together[:6]
        assert answers(generator.generate([[0]], **options)) == together[:1]
        assert len({tuple(answer) for answer in together}) > 5

    def test_batch_size_changes_nothing(self):
        prompts = prompts_of([3, 9, 1, 5], vocab=8)
        options = {"sampling": Sampling(seed=4), "max_new_tokens": 12, "stop_ids": [5], "num_samples": 3}
        expected = Generator(random_chain()).generate(prompts, **options)
        for batch_size in (1, 5, 100):
            model = random_chain()
            assert Generator(model, batch_size=batch_size).generate(prompts, **options) == expected
            assert max(rows for rows, _ in model.widths) <= batch_size

    def test_without_a_seed_the_global_generator_decides(self):
        generator = Generator(random_chain())
        torch.manual_seed(1)
        first, second = (answers(generator.generate([[0]], max_new_tokens=30)) for _ in range(2))
        torch.manual_seed(1)
        assert answers(generator.generate([[0]], max_new_tokens=30)) == first != second

    def test_greedy_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        Generator(random_chain()).generate([[0]], sampling=GREEDY)
        assert torch.equal(before, torch.get_rng_state())


class TestWork:
    def test_finished_rows_leave_the_batch(self):
        model = alphabet()
        Generator(model, Letters()).generate(["v", "a", "x"], sampling=GREEDY, max_new_tokens=5)
        assert [rows for rows, _ in model.widths] == [3, 3, 2, 2, 1]

    def test_a_prompt_is_read_once_for_all_its_answers(self):
        model = alphabet()
        Generator(model).generate([[0, 1], [5]], max_new_tokens=3, num_samples=4)
        assert [rows for rows, _ in model.widths] == [2, 8, 8]

    def test_a_rank_that_is_done_runs_along_until_all_are(self):
        reports: list[bool] = []

        def others_take_seven_steps(unfinished: bool) -> bool:
            reports.append(unfinished)
            return len(reports) < 7

        model = alphabet()
        generator = Generator(model, Letters(), steps_agree=others_take_seven_steps)
        completions = generator.generate(["v", "w"], sampling=Sampling(temperature=0), max_new_tokens=20)
        assert [completion.text for completion in completions] == ["wxy", "xy"]
        assert reports == [True, True, True, False, False, False, False]
        assert [rows for rows, _ in model.widths] == [2, 2, 2, 1, 1, 1, 1]

    def test_running_along_ends_with_the_limit_and_works_with_a_cache(self):
        model = TransformersModel(tiny_llama())
        free = Generator(model).generate([[1], [2, 3]], sampling=Sampling(seed=0), max_new_tokens=9, stop_ids=range(60))
        agreed = Generator(model, steps_agree=lambda _: True).generate(
            [[1], [2, 3]], sampling=Sampling(seed=0), max_new_tokens=9, stop_ids=range(60)
        )
        assert agreed == free
        assert max(len(completion.token_ids) for completion in free) < 9

    def test_each_module_returns_to_its_own_mode(self):
        model = alphabet().train()
        model.dropout.eval()
        Generator(model).generate([[0]], max_new_tokens=1)
        assert model.training
        assert not model.dropout.training

    def test_the_mode_is_restored_after_an_error(self):
        model = Chain(torch.full((4, 4), math.nan)).train()
        with pytest.raises(ConfigurationError, match="NaN"):
            Generator(model).generate([[0]])
        assert model.training


class TestAgainstTransformers:
    """Greedy decoding of a random Llama; its own ``generate`` on each prompt alone is the oracle."""

    LENGTHS = (5, 1, 17, 5)

    def expected(self, model, prompts, **options):
        outputs = [
            model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, **options) for prompt in prompts
        ]
        return [row[0, len(prompt) :].tolist() for row, prompt in zip(outputs, prompts, strict=True)]

    @pytest.mark.parametrize("cached", [True, False])
    def test_ragged_batch(self, cached):
        model, prompts = tiny_llama(), prompts_of(self.LENGTHS)
        generator = Generator(TransformersModel(model) if cached else model)
        ours = answers(generator.generate(prompts, sampling=GREEDY, max_new_tokens=20))
        assert ours == self.expected(model, prompts)
        assert len({tuple(answer) for answer in ours}) == 4

    def test_repetition_penalty(self):
        model, prompts = tiny_llama(), prompts_of(self.LENGTHS)
        sampling = Sampling(temperature=0, repetition_penalty=1.5)
        ours = answers(Generator(TransformersModel(model)).generate(prompts, sampling=sampling, max_new_tokens=20))
        assert ours == self.expected(model, prompts, repetition_penalty=1.5)
        assert ours != self.expected(model, prompts)

    def test_answers_share_the_prefill(self):
        model, prompts = TransformersModel(tiny_llama()), prompts_of(self.LENGTHS)
        options = {"sampling": Sampling(seed=0), "max_new_tokens": 8, "num_samples": 3}
        assert Generator(model).generate(prompts, **options) == Generator(model.model).generate(prompts, **options)


class TestContextLength:
    def learned(self):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2, eos_token_id=None)
        return TransformersModel(GPT2LMHeadModel(config))

    def test_learned_positions_are_a_limit(self):
        with pytest.raises(ConfigurationError, match=r"17 positions.*context_length=16.*at most 10"):
            Generator(self.learned()).generate([[1] * 7], max_new_tokens=11)

    def test_the_last_token_needs_no_position(self):
        (completion,) = Generator(self.learned()).generate([[1] * 7], max_new_tokens=10)
        assert len(completion.token_ids) == 10

    def test_rotary_positions_go_on_with_a_warning(self):
        generator = Generator(TransformersModel(tiny_llama()))
        with pytest.warns(UserWarning, match="quality"):
            generator.generate([[1] * 120], max_new_tokens=12)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generator.generate([[1] * 120], max_new_tokens=9)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompts": ["a"]}, "tokenizer"),
            ({"prompts": [[]]}, "Prompt 0 is empty"),
            ({"prompts": [[0]], "stop_strings": ["x"]}, "tokenizer"),
            ({"prompts": [[0]], "max_new_tokens": 0}, "max_new_tokens=0"),
            ({"prompts": [[0]], "num_samples": 0}, "num_samples=0"),
        ],
    )
    def test_says_what_is_missing(self, options, message):
        with pytest.raises(ConfigurationError, match=message):
            Generator(alphabet()).generate(**options)

    @pytest.mark.parametrize("wrong", [97, -1])
    def test_ids_that_the_model_does_not_know(self, wrong):
        with pytest.raises(ConfigurationError, match=f"Prompt 1 contains the id {wrong}; the model has 0 to 96"):
            Generator(TransformersModel(tiny_llama())).generate([[96], [5, wrong]])

    @pytest.mark.parametrize("stop_strings", ["abc", [""]])
    def test_stop_strings_are_a_list_of_texts(self, stop_strings):
        with pytest.raises(ConfigurationError, match="stop_strings"):
            Generator(alphabet(), Letters()).generate(["a"], stop_strings=stop_strings)

    def test_stream_complains_at_once(self):
        with pytest.raises(ConfigurationError, match="tokenizer"):
            Generator(alphabet()).stream([0])

    def test_an_empty_batch_size(self):
        with pytest.raises(ConfigurationError, match="batch_size=0"):
            Generator(alphabet(), batch_size=0)

    def test_a_model_that_returns_something_else(self):
        with pytest.raises(ConfigurationError, match="dict"):
            Generator(lambda ids: {}).generate([[0]])

    def test_a_plain_callable_and_an_output_object_will_do(self):
        logits = torch.eye(26).roll(1, dims=1)
        for model in (lambda ids: logits[ids], lambda ids: SimpleNamespace(logits=logits[ids])):
            assert answers(Generator(model).generate([[0]], sampling=GREEDY, max_new_tokens=2)) == [[1, 2]]


class TestBeginMark:
    class Marked(Letters):
        bos_id = 24

    class Unmarked(Letters):
        @property
        def bos_id(self):
            raise AttributeError

    class Published(Letters):
        bos_id = 24
        prefix_ids = ()

    @pytest.mark.parametrize(
        ("tokenizer", "mark"), [(Marked(), (24,)), (Unmarked(), (25,)), (Letters(), ()), (Published(), ())]
    )
    def test_of_text_prompts(self, tokenizer, mark):
        text, ids = Generator(alphabet(), tokenizer).generate(["ab", [7]], max_new_tokens=1)
        assert text.prompt_ids == (*mark, 0, 1)
        assert ids.prompt_ids == (7,)

    def test_makes_an_empty_text_a_prompt(self):
        for tokenizer, mark in ((self.Unmarked(), 25), (Letters(), 25), (self.Published(), 24)):
            (completion,) = Generator(alphabet(), tokenizer).generate([""], sampling=GREEDY, max_new_tokens=1)
            assert completion.prompt_ids == (mark,)

    def test_can_be_chosen(self):
        (completion,) = Generator(alphabet(), Letters(), prefix_ids=[3]).generate(["a"], max_new_tokens=1)
        assert completion.prompt_ids == (3, 0)


def test_models_with_biases_by_distance_are_not_batched_continuously():
    layers = Layer(mixer=Attention(num_heads=2, rope=None))
    plain = TransformerConfig(vocab_size=31, d_model=16, num_layers=1, layers=layers)
    assert supports_slots(plain.build())
    assert not supports_slots(dataclasses.replace(plain, positions=ALiBi(num_heads=2)).build())
