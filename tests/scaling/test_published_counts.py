"""Parameters and FLOPs of models whose papers print them."""

import pytest

from lightning_lm.models import GLU, MLP, Attention, Layer, LayerNorm, LearnedPositions, TransformerConfig
from lightning_lm.scaling import measure_cost

GPT3 = [
    # Brown et al. 2020, arXiv:2005.14165, tables 2.1 (shapes) and D.1: millions of parameters, FLOPs of training on
    # 300 billion tokens, layers, d_model. Two widths are the ones that the printed parameters come from: XL has 2048,
    # as printed, and 13B has 5120, where table 2.1 prints 5140.
    (125, 2.25e20, 12, 768),
    (356, 6.41e20, 24, 1024),
    (760, 1.37e21, 24, 1536),
    (1_320, 2.38e21, 24, 2048),
    (2_650, 4.77e21, 32, 2560),
    (6_660, 1.20e22, 32, 4096),
    (12_850, 2.31e22, 40, 5120),
    (174_600, 3.14e23, 96, 12288),
]


@pytest.mark.parametrize(("millions", "flops", "layers", "d_model"), GPT3)
def test_gpt3s_table_of_compute(millions, flops, layers, d_model):
    layer = Layer(mixer=Attention(num_heads=d_model // 64, rope=None, bias="all"), ffn=MLP(bias=True))
    described = TransformerConfig(
        vocab_size=50_257, context_length=2048, d_model=d_model, num_layers=layers, layers=layer, norm=LayerNorm(),
        positions=LearnedPositions(), tie_embeddings=True,
    )  # fmt: skip
    cost = measure_cost(described, 2048)
    assert cost.parameters["total"] / 1e6 == pytest.approx(millions, rel=5e-3)
    assert cost.flops_per_token["total"] * 300e9 == pytest.approx(flops, rel=5e-3)


def test_palms_utilisation():
    """Chowdhery et al. 2022, arXiv:2204.02311, table 1, section 4.1 and appendix B.

    540.35 billion parameters and 238.3 thousand tokens/s on 6,144 TPU v4 of 275e12 FLOP/s: 46.2 % with
    attention, 45.7 % without.
    """
    attention = Attention(num_heads=48, num_kv_heads=1, head_dim=256)
    layer = Layer(mixer=attention, ffn=GLU(hidden_size=4 * 18_432))
    described = TransformerConfig(
        vocab_size=256_000, d_model=18_432, num_layers=118, layers=layer, residual="parallel", tie_embeddings=True
    )
    cost = measure_cost(described, 2048)
    assert cost.parameters["total"] == pytest.approx(540.35e9, rel=1e-3)
    reached = {name: flops * 238_300 / (6144 * 275e12) for name, flops in cost.flops_per_token.items()}
    assert reached["palm"] == pytest.approx(0.462, abs=5e-4)
    assert reached["total"] == pytest.approx(0.457, abs=5e-4)


def test_llama3s_budget():
    """Llama team 2024, arXiv:2407.21783, section 3.2 and table 3: 3.8e25 FLOPs, 405B parameters, 15.6T tokens."""
    layer = Layer(mixer=Attention(num_heads=128, num_kv_heads=8), ffn=GLU(hidden_size=53_248))
    described = TransformerConfig(vocab_size=128_256, d_model=16_384, num_layers=126, layers=layer)
    cost = measure_cost(described, 8192)
    assert round(cost.parameters["total"] / 1e9) in (405, 406)  # 405.9 with the head, which is its own matrix
    assert cost.flops_per_token["total"] * 15.6e12 == pytest.approx(3.8e25, rel=5e-3)


@pytest.mark.parametrize(
    ("parameters", "layers", "d_model", "heads", "key_size"),
    [
        # Hoffmann et al. 2022, arXiv:2203.15556, table A4. Its last column, FLOPs over 6ND (1.03 to 0.99), does not
        # follow from the formulas that are printed above it: they give 1.6 for the first row and 1.03 for the last.
        (73e6, 10, 640, 10, 64),
        (305e6, 20, 1024, 16, 64),
        (552e6, 24, 1280, 10, 128),
        (1.1e9, 26, 1792, 14, 128),
        (1.6e9, 28, 2048, 16, 128),
        (6.8e9, 40, 3584, 28, 128),
    ],
)
def test_sizes_of_chinchillas_second_table(parameters, layers, d_model, heads, key_size):
    attention = Attention(num_heads=heads, head_dim=key_size, rope=None)
    layer = Layer(mixer=attention, ffn=MLP(hidden_size=4 * d_model))
    described = TransformerConfig(
        vocab_size=32_168, d_model=d_model, num_layers=layers, layers=layer, norm=LayerNorm(), tie_embeddings=True
    )
    relative_positions = layers * d_model * heads * key_size  # Transformer-XL's, which ours has not
    total = measure_cost(described, 2048).parameters["total"] + relative_positions
    assert total == pytest.approx(parameters, rel=0.04)
