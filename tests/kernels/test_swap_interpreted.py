"""Exchanged layers whose kernels really run, in Triton's interpreter: a few steps of training as without them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from lightning_lm.kernels.swap.swap import restore, swap
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def own():
    mixer = Attention(num_heads=2, num_kv_heads=1, qk_norm="head", window=9)
    return TransformerConfig(vocab_size=50, d_model=32, num_layers=1, layers=Layer(mixer=mixer, ffn=GLU())).build()


def losses_of(model, **given):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    ids = torch.randint(0, 50, (2, 14), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        logits = model(ids, **given)
        logits = getattr(logits, "logits", logits)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma2Config, None])
def test_training_ends_where_it_does_without_kernels(triton, config):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(own() if config is None else AutoModelForCausalLM.from_config(config(**SIZES)))
    given = {"document_ids": torch.arange(14).expand(2, -1) // 8} if config is None else {}
    done = swap(models[1])
    assert sum(bool(entry.kernel) for entry in done) >= 4
    exchanged, plain = losses_of(models[1], **given), losses_of(models[0], **given)
    restore(done)
    torch.testing.assert_close(exchanged, plain, atol=1e-5, rtol=0)
    assert plain[-1] < plain[0]
