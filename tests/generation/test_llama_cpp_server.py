"""A server that is not ours: llama.cpp's, from PyPI. Runs where ``xllamacpp`` and ``gguf`` are installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import HTTPGenerator, Sampling
from lightning_lm.json_http import JSONServer
from lightning_lm.tokenizers import CharacterTokenizer

SERVER = Path(__file__).parents[1] / "llama_cpp_server.py"
DIGITS = CharacterTokenizer("0123456789=")
TOLERANCE = 2e-3
"""Nats: llama.cpp looks some of its functions up in tables of half precision."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64}
    ids = {"vocab_size": DIGITS.vocab_size, "bos_token_id": None, "eos_token_id": DIGITS.eos_id}
    config = LlamaConfig(**size, **ids, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(folder / "weights.npz", config=json.dumps(model.config.to_dict()), **weights)
    words = [sys.executable, str(SERVER), str(folder / "weights.npz"), str(folder)]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, text=True, **streams) as process:
        try:
            port = int(process.stdout.readline().split()[0])
            server = JSONServer(url=f"http://127.0.0.1:{port}/v1", timeout_s=60.0)
            yield HTTPGenerator(server, "model.gguf", DIGITS)
        finally:
            process.kill()


PROMPTS = [[1, 2, 10], [3, 4, 5, 6, 7, 10], [9]]


def test_ids_and_logprobs_are_those_of_the_model(client, model):
    answers = client.generate(PROMPTS, sampling=Sampling(seed=3), max_new_tokens=6, num_samples=8, logprobs=True)
    assert [list(answer.prompt_ids) for answer in answers] == [prompt for prompt in PROMPTS for _ in range(8)]
    assert {answer.finish_reason for answer in answers} == {"eos", "length"}
    assert len({answer.token_ids for answer in answers}) > 12
    for answer in answers:
        whole = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
        with torch.no_grad():
            scores = model(whole[:, :-1]).logits.log_softmax(-1)[0, len(answer.prompt_ids) - 1 :]
        wanted = scores.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, rtol=0, atol=TOLERANCE)
        assert (answer.token_ids[-1] == DIGITS.eos_id) == (answer.finish_reason == "eos")
        assert answer.finish_reason == "eos" or len(answer.token_ids) == 6


def test_greedy_answers_are_those_of_the_model(client, model):
    greedy = Sampling(temperature=0.0)
    (answer,) = client.generate([PROMPTS[1]], sampling=greedy, max_new_tokens=6, logprobs=True)
    ids = model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=6, do_sample=False, pad_token_id=DIGITS.eos_id)
    assert list(answer.token_ids) == ids[0, len(PROMPTS[1]) :].tolist()


def test_another_temperature_needs_other_logprobs(client):
    with pytest.raises(ConfigurationError, match="at temperature 1"):
        client.generate(PROMPTS, sampling=Sampling(temperature=0.5), logprobs=True)
