import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals import TextScore, evaluate_perplexity
from lightning_lm.models import Attention, Layer, TransformerConfig, TransformersModel

VOCAB = 31


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = Layer(mixer=Attention(num_heads=2))
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=16, num_layers=2, layers=layers, logit_softcap=5.0, dropout=0.5
    )
    model = config.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0)
    return model


def batch(rows, length, seed, documents=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    if not documents:
        return {"input_ids": ids, "labels": labels}
    document_ids = torch.arange(length).expand(rows, -1) // 5
    position_ids = torch.arange(length).expand(rows, -1) % 5
    labels = labels.masked_fill(position_ids == 0, -100)
    return {"input_ids": ids, "labels": labels, "document_ids": document_ids, "position_ids": position_ids}


@torch.no_grad()
def by_hand(model, batches):
    """Sum over single tokens in float64, each document alone."""
    nll, count = 0.0, 0
    for item in batches:
        documents = item.get("document_ids", torch.zeros_like(item["input_ids"]))
        for ids, labels, owner in zip(item["input_ids"], item["labels"], documents, strict=True):
            for document in owner.unique():
                inside = owner == document
                logits = model(ids[inside][None])[0].double().log_softmax(-1)
                for place, label in enumerate(labels[inside][1:].tolist()):
                    if label != -100:
                        nll, count = nll - logits[place, label].item(), count + 1
    return nll, count


@pytest.mark.parametrize("documents", [False, True])
def test_the_score_is_that_of_a_loop_over_tokens_in_float64(model, documents):
    batches = [batch(2, 17, 0, documents), batch(3, 9, 1, documents), batch(1, 2, 2, documents)]
    lengths = np.arange(VOCAB)
    score = evaluate_perplexity(model, batches, token_bytes=lengths)
    assert model.training
    nll, count = by_hand(model.eval(), batches)
    targets = [label for item in batches for row in item["labels"][:, 1:].tolist() for label in row if label != -100]
    assert (score.num_tokens, score.num_bytes) == (count, sum(targets))
    assert score.nll_sum == pytest.approx(nll, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / sum(targets), rel=1e-6)


def test_parts_of_the_model_that_were_frozen_in_evaluation_mode_stay_so(model):
    model.layers[0].eval()
    evaluate_perplexity(model, [batch(1, 4, 0)])
    assert model.training
    assert not model.layers[0].training
    assert model.layers[1].training


def test_a_uniform_model_of_bytes_costs_eight_bits_per_byte():
    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 256)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

        def hidden(self, input_ids, **places):
            return torch.randn(*input_ids.shape, 4)

        def forward(self, input_ids, **places):
            return self.head(self.hidden(input_ids))

    ids = torch.randint(0, 256, (4, 1001), generator=torch.Generator().manual_seed(0))
    score = evaluate_perplexity(Uniform(), [{"input_ids": ids, "labels": ids}], token_bytes=np.ones(256))
    assert score.bits_per_byte == pytest.approx(8.0, abs=1e-6)
    assert score.perplexity == pytest.approx(256.0, rel=1e-6)


def test_a_model_of_transformers_is_scored_through_the_adapter():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCAB, **sizes))
    model = TransformersModel(theirs)
    batches = [batch(2, 17, 0, documents=True)]
    nll, count = by_hand(model.eval(), batches)
    assert evaluate_perplexity(model, batches).loss == pytest.approx(nll / count, rel=1e-6)
    with pytest.raises(ConfigurationError, match="wrap a model of transformers"):
        evaluate_perplexity(theirs, batches)


def test_nothing_to_measure_is_an_error_and_a_hopeless_model_is_not(model):
    empty = batch(2, 8, 0)
    empty["labels"].fill_(-100)
    with pytest.raises(DataError, match="no batch has a target"):
        evaluate_perplexity(model, [empty])
    with pytest.raises(DataError, match="no batch has a target"):
        evaluate_perplexity(model, [])
    with pytest.raises(DataError, match="token_byte_lengths"):
        _ = TextScore(1.0, 1).bits_per_byte
    assert TextScore(1e6, 1).perplexity == math.inf
    assert TextScore(0.0, 5).perplexity == 1.0
