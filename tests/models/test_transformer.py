"""The model as a whole: its names, its residual forms, its promises about documents, causality and initialisation."""

import copy
import dataclasses

import jaxtyping
import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import (
    MLP,
    Attention,
    FanIn,
    Layer,
    LayerNorm,
    LearnedPositions,
    NoNorm,
    RMSNorm,
    Rope,
    SinusoidalPositions,
    Transformer,
    TransformerConfig,
)
from lightning_lm.protocols import LanguageModel

SAME = 5e-6  # float32, two layers, logits of order 10: only the order of sums differs
VOCAB = 50


def small(**changes):
    mixer = changes.pop("mixer", Attention(num_heads=4, num_kv_heads=2))
    ffn = changes.pop("ffn", MLP(hidden_size=24))
    settings = {"d_model": 32, "num_layers": 2, "context_length": 64, "init": FanIn(), **changes}
    torch.manual_seed(0)
    return TransformerConfig(layers=Layer(mixer=mixer, ffn=ffn), **settings).build(VOCAB).eval()


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


VARIANTS = {
    "llama": {},
    "gpt2": {
        "positions": LearnedPositions(),
        "norm": LayerNorm(),
        "mixer": Attention(num_heads=4, rope=None, bias="all"),
        "tie_embeddings": True,
    },
    "sinusoidal": {"positions": SinusoidalPositions(), "mixer": Attention(num_heads=4, rope=None)},
    "no positions": {"mixer": Attention(num_heads=4, rope=None), "norm": NoNorm()},
    "window": {"mixer": Attention(num_heads=4, window=3)},
    "gemma": {
        "residual": "sandwich",
        "norm": RMSNorm(offset=1.0),
        "mixer": Attention(num_heads=4, num_kv_heads=1, softcap=5.0, qk_norm="head", scale=0.2),
        "embed_scale": 32**0.5,
        "logit_softcap": 3.0,
        "tie_embeddings": True,
    },
    "olmo2": {"residual": "reordered", "mixer": Attention(num_heads=4, qk_norm="full")},
    "neox": {"residual": "parallel", "mixer": Attention(num_heads=4, rope=Rope(fraction=0.5)), "norm": LayerNorm()},
    "interleaved": {"residual": "post", "mixer": Attention(num_heads=4, rope=Rope(interleaved=True))},
    "no feed-forward": {"ffn": None},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@variants
def test_meets_the_protocol(changes):
    model = small(**changes)
    assert isinstance(model, LanguageModel)
    logits, features = model(tokens(2, 9)), model.hidden(tokens(2, 9))
    assert logits.shape == (2, 9, VOCAB)
    assert features.shape == (2, 9, 32)
    expected = features.double() @ model.head.weight.double().T
    if model.logit_softcap is not None:
        expected = model.logit_softcap * torch.tanh(expected / model.logit_softcap)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)


@variants
def test_the_past_does_not_know_the_future(changes):
    model, ids = small(**changes), tokens(1, 20)
    changed = ids.clone()
    changed[0, 11] = (ids[0, 11] + 1) % VOCAB
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11], after[:, 11])


@variants
def test_a_packed_document_is_as_if_alone(changes):
    model, ids = small(**changes), tokens(2, 20)
    documents = torch.tensor([[0] * 7 + [1] * 12 + [2], [0] * 20])
    packed = model(ids, document_ids=documents)
    for row, start, end in ((0, 0, 7), (0, 7, 19), (0, 19, 20), (1, 0, 20)):
        alone = model(ids[row : row + 1, start:end])[0]
        torch.testing.assert_close(packed[row, start:end], alone, atol=SAME, rtol=0)


@variants
def test_nothing_leaks_from_one_document_to_the_next(changes):
    model, ids = small(**changes), tokens(1, 20)
    documents = torch.tensor([[0] * 7 + [1] * 13])
    changed = ids.clone()
    changed[0, :7] = (ids[0, :7] + 1) % VOCAB
    before, after = (model(x, document_ids=documents) for x in (ids, changed))
    assert (before[:, 7:] - after[:, 7:]).abs().max() == 0
    assert (before[:, :7] - after[:, :7]).abs().max() > 0


def test_positions_that_are_given_are_used():
    model, ids = small(positions=LearnedPositions()), tokens(2, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    counted = model(ids, document_ids=documents)
    assert torch.equal(counted, model(ids, document_ids=documents, position_ids=positions))
    assert not torch.equal(counted, model(ids, document_ids=documents, position_ids=positions + 1))


def by_hand(model, x, form):
    """One layer, written out for each residual form."""
    block = model.layers[0]
    context = _context(model, x)

    def f(y):
        return block.mixer(y, context)

    a, b, g = block.mixer_norm, block.ffn_norm, block.ffn
    if form == "pre":
        x = x + f(a(x))
        return x + g(b(x))
    if form == "post":
        x = a(x + f(x))
        return b(x + g(x))
    if form == "reordered":
        x = x + a(f(x))
        return x + b(g(x))
    if form == "sandwich":
        x = x + block.mixer_post_norm(f(a(x)))
        return x + block.ffn_post_norm(g(b(x)))
    return x + f(a(x)) + g(b(x))


def _context(model, x):
    caught = []
    handle = model.layers[0].register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[1]))
    model(torch.zeros(x.shape[:2], dtype=torch.long))
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("form", ["pre", "post", "sandwich", "reordered", "parallel"])
def test_residual_forms(form):
    model = small(residual=form, num_layers=1, norm=LayerNorm())
    for name, parameter in model.named_parameters():
        if "norm" in name:  # so that no two norms are alike
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    ids = tokens(2, 5)
    expected = model.norm(by_hand(model, model.embed(ids), form))
    torch.testing.assert_close(model.hidden(ids), expected, atol=SAME, rtol=0)


def test_names_of_the_state_dict():
    model = small(
        residual="sandwich",
        positions=LearnedPositions(),
        mixer=Attention(num_heads=4, qk_norm="head", bias="all"),
        ffn=dataclasses.replace(TransformerConfig(d_model=1, num_layers=1).layers.ffn, hidden_size=24),
        num_layers=1,
    )
    layer = [f"mixer.{x}.{kind}" for x in "qkvo" for kind in ("weight", "bias")]
    layer += ["mixer.q_norm.weight", "mixer.k_norm.weight"]
    layer += [f"ffn.{x}.weight" for x in ("gate", "up", "down")]
    layer += [f"{x}.weight" for x in ("mixer_norm", "mixer_post_norm", "ffn_norm", "ffn_post_norm")]
    expected = ["embed.weight", "positions.weight", *(f"layers.0.{x}" for x in layer), "norm.weight", "head.weight"]
    assert sorted(model.state_dict()) == sorted(expected)


def test_tied_embeddings_are_one_parameter():
    model = small(tie_embeddings=True)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())
    again = small(tie_embeddings=True, init=FanIn(gain=2.0))
    again.load_state_dict(model.state_dict())
    assert again.head.weight is again.embed.weight
    assert torch.equal(again(tokens(1, 4)), model(tokens(1, 4)))


def test_dropout_acts_in_training_alone():
    model, ids = small(dropout=0.5, mixer=Attention(num_heads=4, dropout=0.5)), tokens(1, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_made_on_the_meta_device_then_filled():
    config = small().config
    with torch.device("meta"):
        model = config.build()
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(5))
    twin = Transformer(config)
    twin.init_weights(torch.Generator().manual_seed(5))
    assert torch.equal(model(tokens(1, 5)), twin(tokens(1, 5)))


def test_a_cast_model_keeps_exact_rotations():
    model = small(context_length=8).bfloat16()
    exact = copy.deepcopy(model).float()
    ids = tokens(1, 600)  # far positions, where angles in bfloat16 would be wrong by whole turns
    error = (model(ids).float() - exact(ids)).abs()
    assert error.mean() < 0.1
    assert error.max() < 0.6


@pytest.mark.parametrize("changes", [{}, {"positions": SinusoidalPositions()}], ids=["rotary", "sinusoidal"])
def test_training_after_a_first_pass_in_inference_mode(changes):
    """Lightning validates once before it trains; tables made there must serve the backward pass too."""
    model = small(**changes)
    with torch.inference_mode():
        model(tokens(1, 5))
    model(tokens(1, 5)).sum().backward()


@pytest.mark.parametrize("changes", [{}, VARIANTS["gemma"]], ids=["llama", "gemma"])
def test_autocast(changes):
    model, ids = small(**changes), tokens(2, 9)
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids, document_ids=torch.zeros_like(ids))
        loss = got.float().logsumexp(-1).sum()
    loss.backward()
    assert (got - exact).abs().mean() < 0.05  # logits of order 1 to 10, of which bfloat16 keeps 8 bits
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_learned_positions_end():
    model = small(positions=LearnedPositions(), context_length=8)
    model(tokens(1, 8))
    with pytest.raises(ConfigurationError, match=r"9 positions .* context_length=8"):
        model(tokens(1, 9))
    with pytest.raises(ConfigurationError, match="21 positions"):
        model(tokens(1, 1), position_ids=torch.tensor([[20]]))


def test_a_copy_is_independent_and_equal():
    model = small()
    before = model(tokens(1, 5))
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(model.head.weight)
    assert torch.equal(twin(tokens(1, 5)), before)


def test_compiled_layers_agree(monkeypatch):
    """With a backend that does not generate code: what is tested is that our forward can be traced."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shape checks cannot be traced
    model, ids = small(num_layers=1), tokens(2, 12)
    packings = [None, *(torch.tensor([[0] * n + [1] * (12 - n), [n] * 12]) for n in range(2, 9))]
    plain = [model(ids, document_ids=documents) for documents in packings]
    names = list(model.state_dict())
    for block in model.layers:
        block.compile(backend="aot_eager")
    compiled = [model(ids, document_ids=documents) for documents in packings]
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=SAME, rtol=0)
    assert list(model.state_dict()) == names


@variants
def test_layers_can_be_called_by_themselves(changes):
    """Without a context rows are single documents from position 0, as in the model."""
    model = small(**changes)
    seen = {}
    for name, layer in model.layers.named_children():
        layer.register_forward_hook(lambda layer, given, result, name=name: seen.update({name: (given[0], result)}))
    with torch.no_grad():
        model(tokens(2, 9))
        found = dict(seen)
        for name, (given, result) in found.items():
            assert torch.equal(model.layers[int(name)](given), result)


def test_an_attention_layer_is_that_of_torch():
    layer = Attention(num_heads=2, rope=None).build(8, norm=RMSNorm()).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    q, k, v = (project(x).view(2, 5, 2, 4).transpose(1, 2) for project in (layer.q, layer.k, layer.v))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), layer.o(mixed.transpose(1, 2).flatten(2)), atol=1e-12, rtol=0)
    with pytest.raises(ConfigurationError, match=r"need the context of the model"):
        layer(x, state=layer.make_state(8))
