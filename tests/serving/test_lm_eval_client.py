"""The requests of lm-evaluation-harness's ``local-completions``, and its reading of the responses.

Its client itself needs packages that its extra ``api`` brings; what it sends and reads is in two functions.
"""

import json
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.openai_completions import LocalCompletionsAPI
from served_models import serving, tiny_model, tiny_tokenizer


def test_local_completions_get_the_log_likelihoods_of_the_model():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = [
        (list(b"The cat"), list(b" sat")),
        (list(b"The cat"), list(b" flew away")),
        (list(b"2 + 2 ="), list(b" 4")),
    ]
    greedy = list(b"abc")
    for _ in range(3):
        greedy.append(int(model(torch.tensor([greedy]))[0, -1, :256].argmax()))
    pairs.append((greedy[:3], greedy[3:]))
    whole = [context + text for context, text in pairs]
    body = LocalCompletionsAPI._create_payload(SimpleNamespace(model="tiny"), whole)
    with serving(model, tokenizer) as (url, _):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
    scored = LocalCompletionsAPI.parse_logprobs(answer, tokens=whole, ctxlens=[len(context) for context, _ in pairs])
    assert [is_greedy for _, is_greedy in scored] == [False, False, False, True]
    for (context, text), (value, _) in zip(pairs, scored, strict=True):
        logprobs = model(torch.tensor([context + text])).double().log_softmax(-1)[0, len(context) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(text)[:, None]).sum()
        assert value == pytest.approx(expected.item(), abs=1e-3)
