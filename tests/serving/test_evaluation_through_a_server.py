"""A model behind our server, asked by our evaluation and by lm-evaluation-harness, gives the scores it gives here."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from served_models import serving, tiny_model, tiny_tokenizer

from lightning_lm.evals import Generation, Likelihood, LocalModel, Prompt, RollingLikelihood, ServerModel
from lightning_lm.models import Attention, Layer, TransformerConfig, export_model
from lightning_lm.tokenizers import BPETokenizer

PAIRS = [("The cat", " sat"), ("The cat ", "flew away"), ("2 + 2 =", " 4"), ("", "a text")]


def test_scores_and_completions_are_those_of_the_model():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    likelihoods = [Likelihood(Prompt(context), text) for context, text in PAIRS]
    requests = [*likelihoods, RollingLikelihood("the whole text")]
    generation = [Generation(Prompt("The cat"), max_new_tokens=6), Generation(Prompt("b"), max_new_tokens=4)]
    local = LocalModel(model, tokenizer, max_length=64)
    with serving(model, tokenizer) as (url, _):
        remote = ServerModel(f"{url}/v1", "tiny", tokenizer=tokenizer, max_length=64)
        got, completed = remote.log_likelihoods(requests), remote.generate(generation)
    expected = local.log_likelihoods(requests)
    assert [answer.logprob for answer in got] == pytest.approx([answer.logprob for answer in expected], abs=1e-3)
    assert [answer.num_tokens for answer in got] == [answer.num_tokens for answer in expected]
    assert [answer.is_greedy for answer in got] == [answer.is_greedy for answer in expected]
    assert [answer.texts for answer in completed] == [answer.texts for answer in local.generate(generation)]


def test_local_completions_of_the_harness_gets_the_scores_of_the_model(tmp_path):
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(["the cat sat on a mat while seven dogs ran past " * 3], vocab_size=300)
    layer = Layer(mixer=Attention(num_heads=2))
    model = TransformerConfig(vocab_size=300, d_model=32, num_layers=1, layers=layer, context_length=64).build()
    export_model(model, tmp_path, tokenizer)
    pairs = [("the cat", " sat on"), ("seven ", "dogs ran"), ("a", " mat")]
    local = LocalModel(model, tokenizer, max_length=64)
    expected = local.log_likelihoods([Likelihood(Prompt(context), text) for context, text in pairs])
    with serving(model, tokenizer) as (url, _):
        client = LocalCompletionsAPI(
            model="tiny", base_url=f"{url}/v1/completions", tokenizer=str(tmp_path), tokenizer_backend="huggingface",
            max_length=64, batch_size=2,
        )  # fmt: skip
        marked = [("<|endoftext|>" + context, text) for context, text in pairs]  # ours puts it there by itself
        got = client.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(marked)])
    assert [value for value, _ in got] == pytest.approx([answer.logprob for answer in expected], abs=1e-3)
    assert [greedy for _, greedy in got] == [answer.is_greedy for answer in expected]
