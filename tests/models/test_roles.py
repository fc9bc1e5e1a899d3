"""Every parameter has one role, in our models and in other libraries'."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_lm.models import MLP, Attention, Layer, LayerNorm, LearnedPositions, TransformerConfig, parameter_roles
from lightning_lm.models.roles import with_role


def our_model(**changes):
    layer = Layer(mixer=Attention(num_heads=2, bias="all", qk_norm="head"), ffn=MLP(hidden_size=8, bias=True))
    settings = {
        "d_model": 8,
        "num_layers": 1,
        "norm": LayerNorm(),
        "positions": LearnedPositions(),
        "context_length": 4,
    }
    return TransformerConfig(layers=layer, **settings, **changes).build(10)


def test_roles_of_our_model():
    roles = parameter_roles(our_model())
    assert roles["embed.weight"] == roles["positions.weight"] == "embedding"
    assert roles["head.weight"] == "head"
    matrices = {
        f"layers.0.{name}.weight" for name in ("mixer.q", "mixer.k", "mixer.v", "mixer.o", "ffn.up", "ffn.down")
    }
    assert {name for name, role in roles.items() if role == "matrix"} == matrices
    others = set(roles) - matrices - {"embed.weight", "positions.weight", "head.weight"}
    assert {roles[name] for name in others} == {"vector"}


@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_appears_once_under_its_own_name(tie):
    model = our_model(tie_embeddings=tie)
    assert list(parameter_roles(model)) == [name for name, _ in model.named_parameters()]
    assert ("head.weight" in parameter_roles(model)) is not tie
    assert parameter_roles(model)["embed.weight"] == "embedding"


def test_a_tied_weight_whose_head_comes_first_is_an_embedding():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 9, bias=False)
            self.table = nn.Embedding(9, 4)
            self.table.weight = self.head.weight

    assert parameter_roles(Reversed()) == {"head.weight": "embedding"}


def test_roles_survive_copies_and_empty_memory():
    model = our_model()
    with torch.device("meta"):
        empty = our_model()
    assert parameter_roles(copy.deepcopy(model)) == parameter_roles(empty.to_empty(device="cpu"))


def test_foreign_models():
    sizes = {
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    roles = parameter_roles(LlamaForCausalLM(LlamaConfig(**sizes)))
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert roles["model.layers.0.self_attn.q_proj.weight"] == "matrix"
    assert roles["model.norm.weight"] == "vector"
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=4))
    roles = parameter_roles(gpt2)
    assert roles["transformer.wte.weight"] == roles["transformer.wpe.weight"] == "embedding"
    assert roles["transformer.h.0.attn.c_attn.weight"] == "matrix"  # their Conv1D is a linear map
    assert "lm_head.weight" not in roles


def test_convolutions_and_marked_modules():
    model = nn.Sequential(nn.Conv1d(2, 3, 4), with_role(nn.Linear(3, 5), "router"), nn.Linear(5, 6))
    assert parameter_roles(model) == {
        "0.weight": "conv",
        "0.bias": "vector",
        "1.weight": "router",
        "1.bias": "vector",
        "2.weight": "matrix",
        "2.bias": "vector",
    }
    assert parameter_roles(nn.Linear(2, 3)) == {"weight": "matrix", "bias": "vector"}
