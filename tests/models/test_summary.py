"""Costs against what torch itself counts on the real model, and against closed forms."""

import math

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lightning_lm.models import (
    GLU,
    MLP,
    Attention,
    Layer,
    LayerNorm,
    LearnedPositions,
    MoE,
    TopK,
    TransformerConfig,
    presets,
)
from lightning_lm.models.huggingface.transformers_model import TransformersModel
from lightning_lm.models.summary import describe, flops_per_token, memory_estimate, parameter_table, render

T = 32
CONFIGS = {
    "llama": TransformerConfig(vocab_size=101, d_model=64, num_layers=3, layers=Layer(mixer=Attention(num_heads=4))),
    "grouped, tied": TransformerConfig(
        vocab_size=101,
        d_model=64,
        num_layers=2,
        layers=Layer(mixer=Attention(num_heads=4, num_kv_heads=2, head_dim=24), ffn=GLU(hidden_size=96)),
        tie_embeddings=True,
    ),
    "gpt2": TransformerConfig(
        vocab_size=101,
        d_model=64,
        num_layers=2,
        context_length=T,
        layers=Layer(mixer=Attention(num_heads=4, rope=None, bias="all"), ffn=MLP(bias=True)),
        norm=LayerNorm(),
        positions=LearnedPositions(),
        tie_embeddings=True,
    ),
    "no feed-forward": TransformerConfig(
        vocab_size=101, d_model=64, num_layers=2, layers=Layer(mixer=Attention(num_heads=2), ffn=None)
    ),
}


def counted(model, rows=2, backward=False):
    ids = torch.zeros(rows, T, dtype=torch.int64)
    # torch counts fused attention on a GPU, but not on a CPU: there it must be made of products that are seen.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(ids)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / (rows * T)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_what_torch_counts(name):
    model = CONFIGS[name].build()
    assert flops_per_token(model, T) / 3 == counted(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_what_torch_counts_where_attention_keeps_its_scores(name):
    model = CONFIGS[name].build()
    # The gradient of a norm's gain may be taken as a product, which is no cost of the model's own: 2 per feature.
    assert flops_per_token(model, T) == pytest.approx(counted(model, backward=True), rel=2e-3)


@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config])
def test_a_foreign_model_is_counted_too(config):
    sizes = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = config(**sizes, max_position_embeddings=T, eos_token_id=None, bos_token_id=None)
    foreign = AutoModelForCausalLM.from_config(settings)
    expected = counted(TransformersModel(foreign))
    assert flops_per_token(foreign, T) / 3 == expected
    assert flops_per_token(TransformersModel(foreign), T) / 3 == expected


def test_a_module_that_holds_the_model_costs_the_same():
    for name in ("llama", "gpt2"):
        model = CONFIGS[name].build()
        shell = nn.ModuleDict({"model": model})
        assert flops_per_token(shell, T) == flops_per_token(model, T)
        assert memory_estimate(shell, 64) == memory_estimate(model, 64)


def test_the_published_rule_for_gpt2():
    # Six operations for each of 124M parameters (but for positions), and PaLM's 12 * layers * width * context.
    config = presets.gpt2("124M")
    biases_and_gains = 12 * (4 * 768 + 9 * 768) + 2 * 768
    expected = 6 * (124_439_808 - 1024 * 768 - biases_and_gains) + 12 * 12 * 768 * 1024
    assert flops_per_token(config, 1024) == expected
    assert flops_per_token(config, 1024) == pytest.approx(6 * 124e6 + 12 * 12 * 768 * 1024, rel=0.01)


@pytest.mark.parametrize("window", [None, 1, 5, T, 2 * T])
def test_windows_and_causal_keys_are_those_of_a_loop(window):
    def config(window):
        layers = Layer(mixer=Attention(num_heads=4, window=window))
        return TransformerConfig(vocab_size=101, d_model=64, num_layers=3, layers=layers)

    rest = flops_per_token(config(1), T) - 3 * 3 * 4 * 64
    visible = [sum(1 for key in range(query + 1) if query - key < (window or T)) for query in range(T)]
    causal = rest + 3 * 3 * 4 * 64 * sum(visible) / T
    assert flops_per_token(config(window), T, causal=True) == pytest.approx(causal, rel=1e-12)
    assert flops_per_token(config(window), T) == rest + 3 * 3 * 4 * 64 * max(visible)


def test_a_config_of_any_size_is_counted_without_its_weights():
    assert flops_per_token(presets.llama3("70B"), 8192) == pytest.approx(6 * 70e9 + 12 * 80 * 8192 * 8192, rel=0.02)


def test_the_table_adds_up():
    model = CONFIGS["gpt2"].build()
    rows = {row.role: row for row in parameter_table(model)}
    assert rows.keys() == {"embedding", "matrix", "vector"}
    assert rows["embedding"].parameters == (101 + T) * 64
    assert rows["matrix"].parameters == 2 * 12 * 64 * 64
    assert (rows["matrix"].tensors, rows["matrix"].num_bytes) == (2 * 6, 4 * 2 * 12 * 64 * 64)
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)
    assert parameter_table(nn.Identity()) == []


def saved_bytes(model, rows):
    """Bytes that autograd really keeps for the backward pass, each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.hidden(torch.zeros(rows, 128, dtype=torch.int64))
    del output
    return sum(kept.values())


@pytest.mark.parametrize("name", ["llama", "grouped, tied", "gpt2"])
def test_activations_are_roughly_what_autograd_keeps(name):
    config = CONFIGS[name]
    if config.positions is not None:
        config = TransformerConfig.from_dict({**config.to_dict(), "context_length": 128})
    model = config.build()
    estimate = memory_estimate(model, 8 * 128).activations
    assert estimate == pytest.approx(saved_bytes(model, 8), rel=0.35)


def test_memory_follows_the_parameters_the_optimizer_and_the_precision():
    model = CONFIGS["llama"].build()
    count = sum(parameter.numel() for parameter in model.parameters())
    adamw = memory_estimate(model, 64)
    assert (adamw.parameters, adamw.gradients, adamw.optimizer_states) == (4 * count, 4 * count, 8 * count)
    assert adamw.total == 16 * count + adamw.activations
    model.embed.requires_grad_(False)
    half = memory_estimate(model.to(torch.bfloat16), 64, states_per_parameter=1.0, activation_bytes=2)
    assert half.gradients == half.optimizer_states == 2 * (count - 101 * 64)
    assert half.activations == adamw.activations // 2


def test_a_description_is_shown_as_a_table():
    with torch.device("meta"):
        model = presets.gpt2("124M").build()
    description = describe(model, 1024, rows=4)
    assert description.num_parameters == 124_439_808
    assert description.memory == memory_estimate(model, 4096)
    console = Console(width=120, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(render(description))
    text = capture.get()
    for shown in (
        "124.44 M parameters",
        "embedding",
        "matrix",
        "MFLOPs per trained token at context 1024",
        "474.7 MiB",
    ):
        assert shown in text
    assert math.isclose(124_439_808 * 4 / 2**20, 474.7, abs_tol=0.05)


def test_weights_that_only_some_tokens_meet_are_counted_by_their_share():
    experts = nn.Module()
    experts.weight, experts.active_share = nn.Parameter(torch.empty(8, 4, 4)), 2 / 8
    assert flops_per_token(nn.Sequential(experts), 16) == 3 * 2 * (2 * 4 * 4)


def test_activations_of_experts_are_those_of_a_dense_layer_of_the_active_width():
    def activations(ffn):
        layer = Layer(mixer=Attention(num_heads=2), ffn=ffn)
        model = TransformerConfig(vocab_size=64, d_model=32, num_layers=2, layers=layer).build()
        return memory_estimate(model, 100, autocast=False).activations

    experts = activations(MoE(experts=GLU(hidden_size=48), num_experts=8, router=TopK(k=2)))
    second_output = 2 * 2 * 32 * 100 * 4  # each of two experts has an output; the router's few logits are left out
    assert experts == activations(GLU(hidden_size=96)) + second_output
