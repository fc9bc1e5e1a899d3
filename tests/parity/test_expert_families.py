"""Mixtures of experts against those of transformers beyond whole rows: cached, left-padded, and their gradients."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import LaggedLoss, LoadBias, MoE, config_from_huggingface
from lightning_lm.models.huggingface.config_json import config_to_huggingface
from lightning_lm.models.huggingface.folder import load_huggingface

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=12, norm_topk_prob=True),
    "olmoe": OlmoeConfig(**SIZES, num_experts=5),
}


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    """The same weights, of a size that every expert is felt in the logits, in both libraries."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    theirs.save_pretrained(tmp_path)
    return theirs, load_huggingface(tmp_path).eval()


@torch.no_grad()
def test_cached_and_left_padded_rows_are_those_of_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    cache = ours.make_cache(2, 9, starts=torch.tensor([0, 4]))
    steps = [ours(ids[:, :6], cache=cache)] + [ours(ids[:, i : i + 1], cache=cache) for i in range(6, 9)]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], expected[real], rtol=0, atol=2e-5)


def test_gradients_of_stacks_are_those_of_each_expert(pair):
    theirs, ours = pair
    ids = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(1))
    for model in (theirs, ours):
        logits = model(ids).logits if model is theirs else model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    layer, stacks = theirs.model.layers[1].mlp, ours.layers[1].ffn.experts
    gates, ups = layer.experts.gate_up_proj.grad.chunk(2, 1)
    found = [stacks.gate.weight.grad, stacks.up.weight.grad, stacks.down.weight.grad]
    wanted = [gates, ups, layer.experts.down_proj.grad]
    pairs = [*zip(found, wanted, strict=True), (ours.layers[1].ffn.router.weight.grad, layer.gate.weight.grad)]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-6)


def test_a_bias_on_the_choice_is_no_softmax_router_and_the_loss_is_kept_where_it_is_asked_for():
    settings = CONFIGS["mixtral"].to_dict() | {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    config = config_from_huggingface(settings)
    part = config.layers.ffn
    assert part.balance == LaggedLoss(weight=0.02)
    assert config_from_huggingface(config_to_huggingface(config)) == config
    biased = MoE(experts=part.experts, num_experts=4, router=part.router, balance=LoadBias())
    layers = dataclasses.replace(config.layers, ffn=biased)
    with pytest.raises(ConfigurationError, match="mixtral: it has no layers"):
        config_to_huggingface(dataclasses.replace(config, layers=layers))
