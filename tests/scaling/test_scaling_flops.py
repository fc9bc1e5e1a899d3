"""Parameters and FLOPs in every convention, against torch's own counter, published sizes and formulas written out."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import GLU, MLP, Attention, Layer, LayerNorm, TransformerConfig, presets
from lightning_lm.scaling import CONVENTIONS, measure_cost

T = 32
PARTS = {
    "llama": Layer(mixer=Attention(num_heads=4), ffn=GLU()),
    "grouped, gated, window": Layer(mixer=Attention(num_heads=4, num_kv_heads=2, window=8), ffn=GLU(activation="gelu")),
    "plain": Layer(mixer=Attention(num_heads=4, rope=None, bias="all"), ffn=MLP(bias=True)),
    "wide heads, no feed-forward": Layer(mixer=Attention(num_heads=2, head_dim=48), ffn=None),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_products_are_what_torch_counts(name, tied):
    config = TransformerConfig(vocab_size=101, d_model=64, num_layers=3, layers=PARTS[name], tie_embeddings=tied)
    model = config.build()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, T, dtype=torch.int64))
    counted = 3 * counter.get_total_flops() / (2 * T)
    window = 8 if "window" in name else T
    unseen = 3 * 3 * 4 * 64 * (T - window)  # torch multiplies what a window hides
    assert measure_cost(model, T).flops_per_token["products"] == counted - unseen
    assert measure_cost(config, T) == measure_cost(model, T)


@pytest.mark.parametrize(
    ("config", "total", "embedding"),
    [
        # The weights of the releases, counted by their authors: model cards, and config.json for the tables.
        (presets.gpt2("124M"), 124_439_808, (50_257 + 1024) * 768),
        (presets.gpt2("1.5B"), 1_557_611_200, (50_257 + 1024) * 1600),
        (presets.llama2("7B"), 6_738_415_616, 32_000 * 4096),
        (presets.llama2("70B"), 68_976_648_192, 32_000 * 8192),
        (presets.llama3("8B"), 8_030_261_248, 128_256 * 4096),
        (presets.llama3("1B"), 1_235_814_400, 128_256 * 2048),
    ],
)
def test_published_sizes(config, total, embedding):
    cost = measure_cost(config, 1024)
    head = 0 if config.tie_embeddings else embedding
    assert cost.parameters == {
        "total": total,
        "embedding": embedding,
        "head": head,
        "non_embedding": total - embedding - head,
    }
    assert cost.size("total") == total
    assert cost.size("non_embedding") == total - embedding - head


CHINCHILLA_TABLE = [
    # Hoffmann et al. 2022, arXiv:2203.15556, table A9: millions of parameters, d_model, heads, layers.
    (44, 512, 8, 8),
    (57, 576, 9, 9),
    (74, 640, 10, 10),
    (90, 640, 10, 13),
    (106, 640, 10, 16),
    (117, 768, 12, 12),
    (140, 768, 12, 15),
    (163, 768, 12, 18),
    (175, 896, 14, 14),
    (196, 896, 14, 16),
    (217, 896, 14, 18),
    (251, 1024, 16, 16),
    (278, 1024, 16, 18),
    (306, 1024, 16, 20),
    (425, 1280, 10, 18),
    (489, 1280, 10, 21),
    (552, 1280, 10, 24),
]


def of_chinchilla(d_model, heads, layers):
    layer = Layer(mixer=Attention(num_heads=heads, rope=None), ffn=MLP(hidden_size=4 * d_model))
    return TransformerConfig(
        vocab_size=32_168, d_model=d_model, num_layers=layers, layers=layer, norm=LayerNorm(), tie_embeddings=True
    )


@pytest.mark.parametrize(("millions", "d_model", "heads", "layers"), CHINCHILLA_TABLE)
def test_sizes_of_chinchillas_table(millions, d_model, heads, layers):
    total = measure_cost(of_chinchilla(d_model, heads, layers), 2048).parameters["total"]
    relative_positions = layers * d_model**2  # Transformer-XL's projection of positions, which ours has not
    assert (total + relative_positions) / 1e6 == pytest.approx(millions, abs=0.6)


def test_chinchillas_flops_are_the_formulas_of_its_appendix():
    d, heads, layers, vocab, width = 640, 10, 10, 32_168, 2560
    seq = 2048
    attention = 2 * 3 * seq * d * d + 2 * seq * seq * d + 3 * heads * seq * seq + 2 * seq * seq * d + 2 * seq * d * d
    dense = 2 * seq * (d * width + d * width)
    forward = 2 * seq * vocab * d + layers * (attention + dense) + 2 * seq * d * vocab
    cost = measure_cost(of_chinchilla(d, heads, layers), seq)
    assert cost.flops_per_token["chinchilla"] == pytest.approx(3 * forward / seq, rel=1e-12)


def test_the_other_conventions_are_their_formulas():
    config = presets.gpt2("124M")
    cost = measure_cost(config, 1024)
    inner = 124_439_808 - (50_257 + 1024) * 768
    assert cost.flops_per_token["non_embedding"] == 6 * inner
    assert cost.flops_per_token["kaplan"] == 6 * inner + 6 * 12 * 1024 * 768
    assert cost.flops_per_token["palm"] == 6 * 124_439_808 + 12 * 12 * 12 * 64 * 1024
    assert set(cost.flops_per_token) == set(CONVENTIONS)
    with pytest.raises(ConfigurationError, match="there are non_embedding, kaplan"):
        cost.size("mine")


def test_a_model_of_transformers_counts_the_same():
    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4))
    layer = Layer(mixer=Attention(num_heads=4), ffn=GLU(hidden_size=96))
    ours = TransformerConfig(vocab_size=101, d_model=64, num_layers=2, layers=layer)
    assert measure_cost(theirs, T) == measure_cost(ours, T)
