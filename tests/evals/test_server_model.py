import json
import math
from collections import Counter
from typing import ClassVar

import pytest

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.evals import Generation, Likelihood, Prompt, RollingLikelihood
from lightning_lm.evals.server_model import CachedServer, ServerModel
from lightning_lm.tokenizers import ByteTokenizer


class Stub(CachedServer):
    """A server that gives each character a log-probability of minus its code over 1000."""

    asked: ClassVar = Counter()
    change = staticmethod(lambda response: response)

    def _attempt(self, path, data, headers):
        body = json.loads(data)
        self.asked[path] += 1
        if path == "chat/completions":
            return {"choices": [{"message": {"content": body["messages"][-1]["content"].upper()}}], "usage": {}}
        if not body.get("echo"):
            choices = [{"text": f" {body['seed']}-{index}"} for index in range(body["n"])]
            return {"choices": choices, "usage": {"completion_tokens": 4}}
        prompt = body["prompt"]
        ids = [ord(letter) for letter in prompt] if isinstance(prompt, str) else prompt
        values = [None, *(-token / 1000 for token in ids[1:]), -9.0]
        top = [None, *({"x": -ord("o") / 1000} for _ in ids[1:]), {"x": 0.0}]
        found = {"token_logprobs": values, "top_logprobs": top, "text_offset": [*range(len(ids)), len(ids)]}
        return self.change({"choices": [{"logprobs": found}]})


@pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()])
def test_likelihoods_are_sums_over_the_continuation(tokenizer):
    model = ServerModel(Stub("http://localhost:1/v1"), "m", tokenizer=tokenizer)
    first, second = model.log_likelihoods([Likelihood(Prompt("Say "), "nz"), Likelihood(Prompt("Say"), "o")])
    assert first.logprob == pytest.approx(-sum(map(ord, " nz")) / 1000)
    assert (first.num_tokens, first.is_greedy) == (3, False)
    assert (second.num_tokens, second.is_greedy) == (1, True)
    (text,) = model.log_likelihoods([RollingLikelihood("abc")])
    assert text.logprob == pytest.approx(-sum(map(ord, "abc" if tokenizer else "bc")) / 1000)


def test_completions_have_the_seed_and_chats_the_turns():
    model = ServerModel(Stub("http://localhost:1/v1"), "m")
    from lightning_lm.generation import Sampling

    (found,) = model.generate([Generation(Prompt("Go"), num_samples=2, sampling=Sampling(seed=7))])
    assert (found.texts, found.num_tokens) == ((" 7-0", " 7-1"), (2, 2))
    chat = ServerModel(Stub("http://localhost:1/v1"), "m", chat=True)
    assert chat.generate([Generation(Prompt("go"))])[0].texts == ("GO",)
    with pytest.raises(ConfigurationError, match="no likelihoods"):
        chat.log_likelihoods([Likelihood(Prompt("a"), "b")])


def test_nothing_is_asked_twice_and_a_cut_line_is_asked_again(tmp_path):
    Stub.asked.clear()
    path = tmp_path / "responses"
    asked = [Likelihood(Prompt("Say"), letter) for letter in "abab"]
    first = ServerModel(Stub("http://localhost:1/v1", cache=path), "m", max_requests=1).log_likelihoods(asked)
    assert Stub.asked["completions"] == 2
    path.write_bytes(path.read_bytes()[:-20])
    again = ServerModel(Stub("http://localhost:1/v1", cache=path), "m", max_requests=1).log_likelihoods(asked)
    assert again == first
    assert Stub.asked["completions"] == 3
    ServerModel(Stub("http://localhost:1/v1", cache=path), "m", max_requests=1).log_likelihoods(asked)
    assert Stub.asked["completions"] == 3, "what was asked after the cut line is on a line of its own"


def test_garbage_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "responses"
    asked = [Likelihood(Prompt("Say"), "a")]
    monkeypatch.setattr(Stub, "change", staticmethod(lambda _: {"choices": [{"text": "no logprobs"}]}))
    with pytest.raises(RemoteError):
        ServerModel(Stub("http://localhost:1/v1", cache=path), "m").log_likelihoods(asked)
    assert not path.exists()
    # What an earlier version has kept is asked for again.
    Stub("http://localhost:1/v1", cache=path).post("completions", echoed("Saya"))
    monkeypatch.undo()
    (answer,) = ServerModel(Stub("http://localhost:1/v1", cache=path), "m").log_likelihoods(asked)
    assert answer.logprob == pytest.approx(-ord("a") / 1000)


def echoed(prompt):
    return {"model": "m", "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}


def test_what_cuts_prompts_belongs_to_the_model():
    server = Stub("http://localhost:1/v1")
    told = [
        ServerModel(server, "m").description,
        ServerModel(server, "m", tokenizer=ByteTokenizer()).description,
        ServerModel(server, "m", tokenizer=ByteTokenizer(), max_length=8).description,
    ]
    assert told[1]["tokenizer"] == ByteTokenizer().fingerprint
    assert [len(set(one.items()) - set(told[0].items())) for one in told] == [0, 1, 2]


@pytest.mark.parametrize(
    "response",
    [
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"text": "no logprobs"}]},
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"token_logprobs": [None, math.nan, math.nan], "text_offset": [0, 1, 2]}}]},
        {"choices": [{"logprobs": {"token_logprobs": [None, "x", "x"], "text_offset": [0, 1, 2]}}]},
        {"choices": [{"logprobs": {"token_logprobs": [None], "text_offset": None}}]},
        {"choices": [{"logprobs": {"token_logprobs": 3, "text_offset": ["a"]}}]},
    ],
)
def test_garbage_is_an_error_of_the_server(response, monkeypatch):
    monkeypatch.setattr(Stub, "change", staticmethod(lambda _: response))
    for tokenizer in (None, ByteTokenizer()):
        with pytest.raises(RemoteError):
            ServerModel(Stub("http://localhost:1/v1"), "m", tokenizer=tokenizer).log_likelihoods(
                [Likelihood(Prompt("a"), "b")]
            )
