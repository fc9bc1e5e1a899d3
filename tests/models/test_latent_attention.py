"""Latent attention: the absorbed form is the expanded one, and both are the formulas of the paper. Caches are tested in
test_kv_cache, checkpoints in tests/parity."""

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.rope import rope_frequencies
from lightning_lm.models import GLU, LatentAttention, Layer, LoadBias, MoE, Rope, TransformerConfig
from lightning_lm.models.huggingface.config_json import config_to_huggingface
from lightning_lm.models.lora import attach_adapters
from lightning_lm.models.norms import RMSNorm
from lightning_lm.models.summary import flops_per_token

SAME = 1e-12
PART = LatentAttention(num_heads=3, kv_rank=6, q_rank=5, nope_dim=4, rope_dim=2, v_dim=4)


def layer(part=PART, d_model=12):
    module = part.build(d_model, norm=RMSNorm()).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module.eval()


def rms(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def turned(x, position, base):
    """Multiply the complex numbers of neighbouring features by ``exp(i position frequency)``, one plane at a time."""
    planes = torch.view_as_complex(x.reshape(-1, 2))
    angles = position * rope_frequencies(len(x), base)
    return torch.view_as_real(planes * torch.polar(torch.ones_like(angles), angles)).flatten()


def by_the_paper(module, x):
    """One query, one head and one key at a time: equations 37 to 47 of DeepSeek-V2."""
    part, weights = module.part, {name: value.detach() for name, value in module.named_parameters()}
    latent = rms(x @ weights["kv_down.weight"].T, weights["kv_norm.weight"])
    compressed = rms(x @ weights["q_down.weight"].T, weights["q_norm.weight"])
    shared = x @ weights["k_rope.weight"].T
    size = part.nope_dim + part.rope_dim
    out = []
    for place in range(len(x)):
        heads = []
        for head in range(part.num_heads):
            query = weights["q_up.weight"][head * size : (head + 1) * size] @ compressed[place]
            plain, rotated = query[: part.nope_dim], turned(query[part.nope_dim :], place, part.rope.base)
            w_k = weights["k_up.weight"][head * part.nope_dim : (head + 1) * part.nope_dim]
            w_v = weights["v_up.weight"][head * part.v_dim : (head + 1) * part.v_dim]
            scores = [
                plain @ (w_k @ latent[j]) + rotated @ turned(shared[j], j, part.rope.base) for j in range(place + 1)
            ]
            weigh = (torch.stack(scores) / size**0.5).softmax(0)
            heads.append(sum(weigh[j] * (w_v @ latent[j]) for j in range(place + 1)))
        out.append(weights["o.weight"] @ torch.cat(heads))
    return torch.stack(out)


def test_it_is_the_formula_of_the_paper():
    module = layer()
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        module(x[None])[0].detach(), by_the_paper(module, x), atol=1e-6, rtol=0
    )  # float32 angles


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_absorbed_form_equals_the_expanded_one(new, masked):
    module, seen = layer(), 9
    generator = torch.Generator().manual_seed(2)
    q, q_rope, latent, k_rope = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(2, 3, new, 4), (2, 3, new, 2), (2, seen, 6), (2, seen, 2)]
    )
    mask = torch.ones(2, 1, new, seen, dtype=torch.bool).tril(seen - new) if masked else None
    if masked:
        mask[1, :, :, :3] = False  # the padding of a shorter row
    expected = module.attend_expanded(q, q_rope, latent, k_rope[:, None], mask)
    torch.testing.assert_close(module.attend_absorbed(q, q_rope, latent, k_rope, mask), expected, atol=SAME, rtol=0)


def test_packed_documents_are_as_if_alone():
    model = TransformerConfig(vocab_size=31, d_model=12, num_layers=2, layers=Layer(mixer=PART)).build().double().eval()
    ids = torch.randint(31, (1, 11), generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[0] * 4 + [1] * 6 + [2]])
    alone = torch.cat([model(part) for part in ids.split([4, 6, 1], dim=1)], dim=1)
    torch.testing.assert_close(model(ids, document_ids=documents), alone, atol=SAME, rtol=0)


def test_an_adapter_on_the_expansion_takes_part_in_decoding():
    model = TransformerConfig(vocab_size=31, d_model=12, num_layers=1, layers=Layer(mixer=PART)).build().eval()
    attach_adapters(model, {"r": 2, "target_modules": ["layers.0.mixer.k_up", "layers.0.mixer.v_up"]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.3)
        ids = torch.randint(31, (1, 6), generator=torch.Generator().manual_seed(4))
        cache = model.make_cache(1, 6)
        steps = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(6)], dim=1)
        torch.testing.assert_close(steps, model(ids), atol=1e-5, rtol=0)


def test_the_memory_is_the_latent_and_one_key():
    state = layer().make_state(64)
    state.append(torch.zeros(2, 1, 3, 6), torch.zeros(2, 1, 3, 2))
    assert (state.keys.shape, state.values.shape) == ((2, 1, 64, 6), (2, 1, 64, 2))
    assert state.can_join
    assert state.can_rewind


def test_flops_are_those_of_the_products():
    model = TransformerConfig(vocab_size=31, d_model=12, num_layers=1, layers=Layer(mixer=PART, ffn=None)).build()
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1) - model.embed.weight.numel()
    assert flops_per_token(model, 8) == 3 * (2 * weights + 2 * 8 * 3 * (4 + 2) + 2 * 8 * 3 * 4)


def test_a_fraction_of_the_rotated_part_is_refused():
    with pytest.raises(ConfigurationError, match="rope_dim says"):
        LatentAttention(rope=Rope(fraction=0.5))


def test_a_deepseek_of_defaults_is_exported_whatever_moved_its_bias():
    experts = MoE(experts=GLU(hidden_size=8), num_experts=4, balance=LoadBias(rate=5e-3), shared=GLU(hidden_size=8))
    config = TransformerConfig(vocab_size=31, d_model=12, num_layers=2, layers=Layer(mixer=PART, ffn=experts))
    settings = config_to_huggingface(config)
    assert (settings["model_type"], settings["kv_lora_rank"]) == ("deepseek_v3", PART.kv_rank)
