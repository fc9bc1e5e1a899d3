"""BERT, ModernBERT and T5 both ways: logits of random tiny models, padded and cached, equal those of transformers."""

import json

import pytest
import torch
import transformers

from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import load_huggingface, save_huggingface

BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}


def _randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


def _both_ways(theirs, tmp_path):
    """Return our model of their files, and their model of ours."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_huggingface(tmp_path / "theirs").eval()
    save_huggingface(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    return ours, again


MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def _real(logits: torch.Tensor) -> torch.Tensor:
    return logits[MASK.bool()]


def test_bert(tmp_path) -> None:
    theirs = _randomised(transformers.BertForMaskedLM(transformers.BertConfig(**BERT)))
    ours, again = _both_ways(theirs, tmp_path)
    ids, types = _ids(2, 9), torch.tensor([[0] * 4 + [1] * 5] * 2)
    wanted = theirs(ids, attention_mask=MASK, token_type_ids=types).logits
    found = ours(ids, document_ids=1 - MASK, token_type_ids=types)
    assert torch.allclose(_real(found), _real(wanted), atol=2e-5)
    assert torch.allclose(_real(again(ids, attention_mask=MASK, token_type_ids=types).logits), _real(wanted), atol=2e-5)
    assert torch.allclose(ours(ids[:, :5])[1], wanted[1, :5], atol=2e-5) or types[0, 4] == 1


@pytest.mark.parametrize("bias", [False, True])
def test_modernbert(tmp_path, bias: bool) -> None:
    settings = {**BERT, "num_hidden_layers": 4, "local_attention": 4, "norm_bias": bias, "classifier_bias": bias}
    settings |= {"mlp_bias": bias, "decoder_bias": not bias, "pad_token_id": 0, "attn_implementation": "sdpa"}
    theirs = _randomised(transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**settings)))
    ours, again = _both_ways(theirs, tmp_path)
    ids = _ids(2, 9)
    wanted = theirs(ids, attention_mask=MASK).logits
    assert torch.allclose(_real(ours(ids, document_ids=1 - MASK)), _real(wanted), atol=2e-5)
    assert torch.allclose(_real(again(ids, attention_mask=MASK).logits), _real(wanted), atol=2e-5)


def test_gradients_of_bert(tmp_path) -> None:
    theirs = _randomised(transformers.BertForMaskedLM(transformers.BertConfig(**BERT)))
    ours, _ = _both_ways(theirs, tmp_path)
    ids, labels = _ids(2, 9), _ids(2, 9, seed=3)
    theirs(ids, labels=labels).loss.backward()
    torch.nn.functional.cross_entropy(ours(ids).flatten(0, 1), labels.flatten()).backward()
    pairs = [
        (ours.embed.weight, theirs.bert.embeddings.word_embeddings.weight),
        (ours.layers[1].mixer.k.weight, theirs.bert.encoder.layer[1].attention.self.key.weight),
        (ours.prediction.dense.bias, theirs.cls.predictions.transform.dense.bias),
    ]
    assert all(torch.allclose(mine.grad, other.grad, atol=1e-5) for mine, other in pairs)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_t5(tmp_path, version: str) -> None:
    extra = {} if version == "1.0" else {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    theirs = _randomised(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, **extra)))
    ours, again = _both_ways(theirs, tmp_path)
    assert (ours.config.output_scale is None) == (version == "1.1")
    sources, targets = _ids(2, 9), torch.cat([torch.zeros(2, 1, dtype=torch.int64), _ids(2, 6, seed=2)], dim=1)
    wanted = theirs(input_ids=sources, attention_mask=MASK, decoder_input_ids=targets).logits
    found = ours(sources, targets, source_document_ids=1 - MASK)
    assert torch.allclose(found, wanted, atol=5e-5)
    again = again(input_ids=sources, attention_mask=MASK, decoder_input_ids=targets).logits
    assert torch.allclose(again, wanted, atol=5e-5)
    greedy = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(6):
            logits = theirs(input_ids=sources, attention_mask=MASK, decoder_input_ids=greedy, use_cache=False).logits
            greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], dim=1)
    mine = Generator(ours.given(sources, 1 - MASK)).generate(
        [[0], [0]], sampling=Sampling(temperature=0), max_new_tokens=6
    )
    assert [list(completion.token_ids) for completion in mine] == greedy[:, 1:].tolist()


def test_a_t5_with_a_head_of_its_own_keeps_it(tmp_path) -> None:
    """Published 1.1 checkpoints are untied, whatever newer versions of transformers write into config.json."""
    config = transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    theirs = _randomised(transformers.T5ForConditionalGeneration(config))
    ours, _ = _both_ways(theirs, tmp_path)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "theirs" / "model.safetensors"
    head = torch.randn(50, 16)
    save_file({**load_file(path), "lm_head.weight": head}, path, metadata={"format": "pt"})
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    settings.pop("scale_decoder_outputs", None)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    untied = load_huggingface(tmp_path / "theirs")
    assert torch.equal(untied.head.weight, head)
    assert torch.equal(untied.embed.weight, ours.embed.weight)
    assert untied.config.output_scale is None
