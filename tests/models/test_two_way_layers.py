"""Layers in both directions and prefixes in a whole model: packed rows, padding, caches, refusals."""

import dataclasses

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import (
    ALiBi,
    Attention,
    GatedDeltaNet,
    Layer,
    RelativeBias,
    TransformerConfig,
    flops_per_token,
)
from lightning_lm.models.own_model import accepted_inputs
from lightning_lm.models.positions import Positions

TINY = TransformerConfig(vocab_size=40, d_model=16, num_layers=2, context_length=64)
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 7 + [2] * 1])


def _model(mixer: Attention, positions: Positions | None = None):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, layers=Layer(mixer=mixer), positions=positions)
    model = config.build().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _ids(shape=(1, 12)) -> torch.Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("rope", "positions"), [(True, None), (False, RelativeBias(num_heads=2, bidirectional=True))])
def test_packed_documents_are_as_alone(window, rope, positions) -> None:
    if positions is not None and window is not None:
        return
    mixer = Attention(num_heads=2, causal=False, window=window)
    model = _model(mixer if rope else dataclasses.replace(mixer, rope=None), positions)
    ids = _ids()
    packed = model(ids, document_ids=DOCUMENTS)
    pieces = ids.split([4, 7, 1], dim=1)
    assert torch.allclose(packed, torch.cat([model(piece) for piece in pieces], dim=1), atol=1e-12)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 40
    difference = (model(changed, document_ids=DOCUMENTS) - packed).abs().amax(-1)[0]
    assert (difference[4:] == 0).all()
    assert difference[2] > 0, "a token sees the one after it"


def test_a_model_in_both_directions_cannot_generate() -> None:
    model = _model(Attention(num_heads=2, causal=False))
    assert not model.is_causal
    with pytest.raises(ConfigurationError, match=r"Attention\(causal=False\).*causal=True"):
        Generator(model).generate([[1, 2]], sampling=Sampling(temperature=0), max_new_tokens=2)


def test_prefix_lengths_of_rows_and_of_tokens() -> None:
    model, ids = _model(Attention(num_heads=2)), _ids((2, 12))
    rows = model(ids, prefix_lengths=torch.tensor([5, 0]))
    tokens = model(ids, prefix_lengths=torch.tensor([[5] * 12, [0] * 12]))
    assert torch.equal(rows, tokens)
    assert torch.allclose(rows[1], model(ids[1:])[0], atol=1e-12)
    assert not torch.allclose(rows[0, :4], model(ids[:1])[0, :4], atol=1e-3)
    packed = model(ids[:1], document_ids=DOCUMENTS, prefix_lengths=torch.tensor([[2] * 4 + [7] * 7 + [1]]))
    second = model(ids[:1, 4:11], prefix_lengths=torch.tensor([7]))
    assert torch.allclose(packed[:, 4:11], second, atol=1e-12)


@pytest.mark.parametrize("positions", [None, RelativeBias(num_heads=2), ALiBi(num_heads=2)])
def test_a_cached_prompt_may_be_a_prefix(positions) -> None:
    model, ids = _model(Attention(num_heads=2), positions), _ids((2, 12))
    lengths = torch.tensor([5, 3])
    starts = torch.tensor([0, 2])
    rows = ids.clone()
    cache = model.make_cache(2, 12, starts=starts)
    first = model(rows[:, :5], prefix_lengths=lengths, cache=cache)
    later = torch.cat([model(rows[:, n : n + 1], cache=cache) for n in range(5, 12)], dim=1)
    cached = torch.cat([first, later], dim=1)
    assert torch.allclose(cached[0], model(ids[:1], prefix_lengths=lengths[:1])[0], atol=1e-12)
    assert torch.allclose(cached[1, 2:], model(ids[1:, 2:], prefix_lengths=lengths[1:])[0], atol=1e-12)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([13], "reach from 13 to 13, and the row has 12 tokens"), ([-1], "from -1"), ([1, 2], "one number per row")],
)
def test_impossible_prefixes_are_refused(lengths, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _model(Attention(num_heads=2))(_ids(), prefix_lengths=torch.tensor(lengths))


def test_later_tokens_are_no_prefix() -> None:
    model = _model(Attention(num_heads=2))
    cache = model.make_cache(1, 12)
    model(_ids()[:, :3], cache=cache)
    with pytest.raises(ConfigurationError, match="Only a prompt can be a prefix"):
        model(_ids()[:, :3], cache=cache, prefix_lengths=torch.tensor([2]))


def test_a_bias_and_a_window_are_refused_together() -> None:
    with pytest.raises(ConfigurationError, match="without a sliding window"):
        _model(Attention(num_heads=2, window=3), ALiBi(num_heads=2))(_ids())


def test_flops_count_the_keys_of_both_sides() -> None:
    causal, both = (_model(Attention(num_heads=2, causal=causal)) for causal in (True, False))
    assert flops_per_token(both, 12, causal=True) > flops_per_token(causal, 12, causal=True)
    assert flops_per_token(both, 12, causal=True) == flops_per_token(causal, 12, causal=False)


@pytest.mark.parametrize(("mixer", "takes"), [(GatedDeltaNet(num_heads=2), False), (Attention(num_heads=2), True)])
def test_prefixes_need_a_layer_that_attends(mixer, takes):
    layers = Layer(mixer=mixer, ffn=None)
    model = TransformerConfig(vocab_size=40, d_model=16, num_layers=2, layers=layers).build()
    inputs = {"input_ids": torch.zeros(1, 6, dtype=torch.int64), "prefix_lengths": torch.tensor([3])}
    if takes:
        assert accepted_inputs(model, inputs).keys() == inputs.keys()
    else:
        with pytest.raises(ConfigurationError, match=r"no layer of it attends.*layers of attention"):
            accepted_inputs(model, inputs)
