"""Answers from a real server process: exact ids and log-probabilities, or a refusal."""

import json

import pytest
import torch

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.generation import GenerationBackend, Generator, HTTPGenerator, Sampling
from lightning_lm.json_http import JSONServer
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOS = 256
WARM, GREEDY = Sampling(seed=3), Sampling(temperature=0)


def choice(text, *, index=0, end=(EOS,), finish="stop", **fields):
    """Return a choice as vLLM sends it."""
    ids = [*text.encode(), *end]
    logprobs = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": [-0.5 * n for n in range(len(ids))]}
    return {
        "index": index,
        "text": text,
        "token_ids": ids,
        "logprobs": logprobs,
        "finish_reason": finish,
        "stop_reason": None,
        **fields,
    }


def answer(*choices):
    return {"json": {"id": "cmpl-1", "choices": list(choices)}}


@pytest.fixture
def backend(serve):
    def make(*steps, tokenizer=TOKENIZER, **settings):
        scenario = serve(*steps)
        server = JSONServer(url=f"{scenario.url}/v1", backoff_s=0.0, timeout_s=20.0)
        return HTTPGenerator(server, "policy", tokenizer, **settings), scenario

    return make


def test_answers_come_in_the_order_of_prompts_and_samples(backend):
    prompts = [[number, 7] for number in range(20)]
    by_prompt = {
        json.dumps(prompt): answer(*(choice(f"{prompt[0]}-{index}", index=index) for index in (2, 0, 1)))
        for prompt in prompts
    }
    generator, scenario = backend({"status": 500}, {"by_prompt": by_prompt}, max_requests=5)
    completions = generator.generate(prompts, sampling=WARM, num_samples=3, logprobs=True, max_new_tokens=9)
    assert [completion.text for completion in completions] == [f"{n}-{j}" for n in range(20) for j in range(3)]
    for completion, prompt in zip(completions, [prompt for prompt in prompts for _ in range(3)], strict=True):
        assert completion.prompt_ids == tuple(prompt)
        assert completion.token_ids == (*completion.text.encode(), EOS)
        assert completion.logprobs == tuple(-0.5 * n for n in range(len(completion.token_ids)))
        assert completion.finish_reason == "eos"
    bodies = [request["body"] for request in scenario.requests]
    assert len(bodies) == 21
    assert len({body["seed"] for body in bodies}) == 20
    assert all((body["n"], body["max_tokens"], body["model"]) == (3, 9, "policy") for body in bodies)


def test_every_option_is_sent_since_servers_have_defaults_of_their_own(backend):
    generator, scenario = backend(answer(choice("a")), options={"priority": 1})
    generator.generate([[1]], sampling=GREEDY, stop_ids=[9, 5])
    generator.generate([[1]], sampling=Sampling(temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=1.2))
    first, second = (request["body"] for request in scenario.requests)
    off = {"temperature": 0.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    off |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": [], "stop_token_ids": [5, 9, EOS], "priority": 1}
    assert {name: first[name] for name in off} == off
    assert "seed" not in first
    assert "logprobs" not in first
    assert (second["top_k"], second["top_p"], second["min_p"], second["repetition_penalty"]) == (4, 0.9, 0.1, 1.2)


def test_the_same_seed_asks_the_same_and_none_takes_a_new_one(backend):
    generator, scenario = backend(answer(choice("a")))
    for seed in (3, 3, 4, None, None):
        generator.generate([[1]], sampling=Sampling(seed=seed))
    seeds = [request["body"]["seed"] for request in scenario.requests]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize(
    ("sent", "settings", "reason", "text"),
    [
        (choice("ab"), {}, "eos", "ab"),
        (choice("ab", end=(), finish="length"), {}, "length", "ab"),
        (choice("ab", finish="length"), {}, "eos", "ab"),
        (choice("ab", end=(9,), stop_reason=9), {"stop_ids": [9]}, "stop", "ab"),
        (choice("ab", end=(7,), stop_reason=7), {}, "stop", "ab"),
        (choice("a\n\nb", end=(), stop_reason="\n\n"), {"stop_strings": ["\n\n"]}, "stop", "a"),
        (choice("aä", end=(), finish="length"), {}, "length", "aä"),
    ],
)
def test_why_an_answer_ended_and_its_text(backend, sent, settings, reason, text):
    generator, _ = backend(answer(sent))
    (completion,) = generator.generate([[1]], sampling=WARM, logprobs=True, **settings)
    assert (completion.finish_reason, completion.text) == (reason, text)
    assert completion.token_ids == tuple(sent["token_ids"])


def test_ids_may_come_as_the_names_of_tokens(backend):
    generator, _ = backend(answer(choice("hi", token_ids=None)))
    (completion,) = generator.generate([[1]], sampling=WARM, logprobs=True)
    assert completion.token_ids == (104, 105, EOS)


def test_ids_and_logprobs_may_come_together_for_each_token(backend):
    """As llama.cpp sends them, which knows no ``token_ids``."""
    content = [{"id": token, "token": "", "logprob": -0.25 * token} for token in (104, 105, EOS)]
    generator, _ = backend(answer(choice("hi", token_ids=None, logprobs={"content": content})))
    (completion,) = generator.generate([[1]], logprobs=True)
    assert completion.token_ids == (104, 105, EOS)
    assert completion.logprobs == (-26.0, -26.25, -0.25 * EOS)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_without_a_tokenizer_the_server_says_how_it_ended(backend, reason):
    generator, _ = backend(answer(choice("hi", finish=reason)), tokenizer=None)
    (completion,) = generator.generate([[1]], sampling=WARM, logprobs=True, stop_strings=["\n"])
    assert (completion.token_ids, completion.text, completion.finish_reason) == ((104, 105, EOS), "hi", reason)


PLAIN = {"index": 0, "text": "hi", "finish_reason": "stop"}


def test_a_text_without_ids_is_refused_for_training_and_tokenized_again_otherwise(backend):
    named = PLAIN | {"logprobs": {"tokens": ["h", "i"], "token_logprobs": [-1.0, -1.0]}}
    with pytest.raises(RemoteError, match="return_token_ids"):
        backend(answer(named))[0].generate([[1]], sampling=WARM, logprobs=True)
    with pytest.raises(RemoteError, match="return_token_ids"):
        backend(answer(PLAIN), tokenizer=None)[0].generate([[1]])
    (completion,) = backend(answer(PLAIN))[0].generate([[1]], sampling=GREEDY)
    assert (completion.token_ids, completion.text, completion.finish_reason) == ((104, 105, EOS), "hi", "eos")
    assert completion.logprobs is None


@pytest.mark.parametrize("indices", [[], [0], [0, 1, 2], [0, 0], [0, None]])
def test_another_number_of_answers_is_refused(backend, indices):
    generator, _ = backend(answer(*(choice("a", index=index) for index in indices)))
    with pytest.raises(RemoteError, match="n=2"):
        generator.generate([[1]], num_samples=2)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (choice("a", finish="abort"), "abort"),
        (choice("a", prompt_token_ids=[256, 1]), "ids other than the prompt"),
        (choice("a", token_ids=[97, 1.5]), "whole numbers"),
        (choice("a", token_ids=[97, 999]), "999"),
        (choice("a", token_ids=[97, EOS, 97]), "continued after"),
        (choice("a", end=()), "without the id"),
        (choice("a", logprobs=None), "sent none"),
        (choice("a", logprobs={"token_logprobs": [-1.0]}), "sent 1"),
        (choice("a", logprobs={"token_logprobs": [-1.0, None]}), "finite"),
        (choice("a", logprobs={"token_logprobs": [-1.0, float("nan")]}), "finite"),
        (choice("a", logprobs={"token_logprobs": [-1.0, True]}), "finite"),
        (choice("a", logprobs={"token_logprobs": [-1.0, 5.0]}), "none is above 0"),
        (choice("a", logprobs={"token_logprobs": [-1.0, -(10**400)]}), "-1000"),
        (choice("a", logprobs=[1.0]), "sent none"),
        (choice("a", token_ids=[97] * 100_001), "100,001 tokens"),
        (choice("a", token_ids=[97, 10**30]), "whole numbers"),
        (choice("a", token_ids=None, logprobs={"tokens": ["token_id:" + "7" * 5_000]}), "return_token_ids"),
        (choice("a", token_ids=None, logprobs={"tokens": 7}), "return_token_ids"),
    ],
)
def test_what_is_not_exact_is_refused(backend, sent, message):
    generator, _ = backend(answer(sent))
    with pytest.raises(RemoteError, match=message):
        generator.generate([[1]], sampling=WARM, logprobs=True)


@pytest.mark.parametrize("wrong", [{}, {"choices": None}, {"choices": ["a"]}, {"error": "busy"}])
def test_an_answer_of_another_form_is_refused(backend, wrong):
    generator, _ = backend({"json": wrong})
    with pytest.raises(RemoteError, match="list of choices"):
        generator.generate([[1]])


def test_after_a_failure_nothing_more_is_asked(backend):
    generator, scenario = backend({"status": 400, "raw": "no such model"}, max_requests=1)
    with pytest.raises(RemoteError, match="no such model"):
        generator.generate([[1]] * 1000)
    assert len(scenario.requests) < 1000


@pytest.mark.parametrize(
    ("sampling", "at_temperature", "message"),
    [(Sampling(temperature=0.7), False, "processed_logprobs"), (Sampling(top_p=0.9), True, "truncation")],
)
def test_logprobs_of_another_distribution_are_refused(backend, sampling, at_temperature, message):
    generator, scenario = backend(answer(choice("a")), logprobs_at_temperature=at_temperature)
    with pytest.raises(ConfigurationError, match=message):
        generator.generate([[1]], sampling=sampling, logprobs=True)
    assert scenario.requests == []
    generator.generate([[1]], sampling=sampling)


@pytest.mark.parametrize("wrong", [{"num_samples": 0}, {"max_new_tokens": 0}, {"stop_strings": "a"}])
def test_settings_that_cannot_work_are_refused(backend, wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        backend(answer())[0].generate([[1]], **wrong)


@pytest.mark.parametrize("prompt", [[], "text"])
def test_a_prompt_must_be_ids(backend, prompt):
    with pytest.raises(ConfigurationError, match="Prompt 0"):
        backend(answer())[0].generate([prompt])


@pytest.mark.parametrize("settings", [{"stop_ids": [120, 121]}, {"stop_strings": ["a", "e", "\u00e9"]}])
def test_what_our_generator_says_comes_back_as_it_was(backend, settings):
    layers = Layer(mixer=Attention(num_heads=2))
    torch.manual_seed(0)
    model = TransformerConfig(vocab_size=TOKENIZER.vocab_size, d_model=16, num_layers=1, layers=layers).build()
    asked = {"sampling": WARM, "max_new_tokens": 40, "num_samples": 30, "logprobs": True, **settings}
    expected = Generator(model, TOKENIZER).generate([[104, 105]], **asked)
    sent = [
        choice(
            completion.text,
            index=index,
            token_ids=list(completion.token_ids),
            logprobs={"token_logprobs": list(completion.logprobs)},
            finish="length" if completion.finish_reason == "length" else "stop",
        )
        for index, completion in enumerate(expected)
    ]
    assert {completion.finish_reason for completion in expected} >= {"length", "stop"}
    assert backend(answer(*sent))[0].generate([[104, 105]], **asked) == expected


def test_both_generators_fit_the_protocol(backend):
    assert isinstance(backend(answer())[0], GenerationBackend)
    assert isinstance(Generator(lambda ids: ids), GenerationBackend)
    assert backend(answer())[0].generate([]) == []


OPENAI = ["model", "prompt", "max_tokens", "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "stop"]
OPENAI += ["seed", "logprobs"]


@pytest.mark.parametrize("told", [False, True])
def test_a_server_that_takes_only_the_fields_of_openai(backend, told):
    plain = {"index": 0, "text": "ab", "finish_reason": "stop"}
    generator, scenario = backend({"strict": OPENAI, **answer(plain)}, openai_fields_only=told)
    for _ in range(2):
        (completion,) = generator.generate([[1]], sampling=WARM)
        assert (completion.text, completion.finish_reason) == ("ab", "eos")
    assert [set(request["body"]) <= set(OPENAI) for request in scenario.requests] == ([] if told else [False]) + [
        True
    ] * 2
    for settings, words in (
        ({"sampling": Sampling(top_k=4, min_p=0.1)}, "top_k=4, min_p=0.1 cannot be sent"),
        ({"stop_ids": [9]}, r"stop_token_ids=\[9, 256\] cannot be sent"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            generator.generate([[1]], **settings)
    with pytest.raises(RemoteError, match="sent no token ids"):
        generator.generate([[1]], logprobs=True)


def test_a_refusal_of_something_else_is_passed_on(backend):
    generator, scenario = backend({"status": 400, "json": {"error": "the prompt is too long"}})
    with pytest.raises(RemoteError, match="the prompt is too long"):
        generator.generate([[1]])
    assert len(scenario.requests) == 1


@pytest.mark.parametrize("exact", [False, True])
def test_more_tokens_than_were_asked_for_are_refused(backend, exact):
    sent = choice("a" * 100_000, finish="length")
    generator, _ = backend(answer(sent if exact else {**sent, "token_ids": None, "logprobs": None}))
    with pytest.raises(RemoteError, match=r"100,00[01] tokens, and was asked for max_tokens=8"):
        generator.generate([[1]], max_new_tokens=8, logprobs=exact)


@pytest.mark.parametrize(("value", "words"), [(5.0, "none is above 0"), (True, "not a finite number: True")])
def test_numbers_that_are_no_log_probabilities_are_refused(backend, value, words):
    logprobs = {"tokens": ["token_id:97", "token_id:256"], "token_logprobs": [-0.5, value]}
    generator, _ = backend(answer(choice("a", logprobs=logprobs)))
    with pytest.raises(RemoteError, match=words):
        generator.generate([[1]], logprobs=True)
