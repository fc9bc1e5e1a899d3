"""Encoder-decoders: targets see their own source, packed, padded, cached, sampled, searched."""

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import (
    MLP,
    Attention,
    CrossAttention,
    EncoderDecoderConfig,
    Layer,
    RelativeBias,
    SinusoidalPositions,
    TransformerConfig,
    decoder_layers,
)

BOTH = Attention(num_heads=2, causal=False, rope=None)
GREEDY = Sampling(temperature=0)


def _config(*, relative: bool = True, context_length: int = 32) -> EncoderDecoderConfig:
    positions = [RelativeBias(2, bidirectional=True), RelativeBias(2)] if relative else [SinusoidalPositions()] * 2
    layers = decoder_layers(attention=Attention(num_heads=2, rope=None), cross=CrossAttention(num_heads=2))
    common = {"d_model": 16, "vocab_size": 30}
    return EncoderDecoderConfig(
        encoder=TransformerConfig(num_layers=2, layers=Layer(mixer=BOTH, ffn=MLP()), positions=positions[0], **common),
        decoder=TransformerConfig(num_layers=4, layers=layers, positions=positions[1], **common),
        context_length=context_length,
    )


def _model(**settings):
    torch.manual_seed(0)
    model = _config(**settings).build().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def _ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 30, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("relative", [True, False])
def test_target_i_of_a_packed_row_sees_source_i_alone(relative: bool) -> None:
    model = _model(relative=relative)
    sources, targets = _ids(1, 12), _ids(1, 9, seed=2)
    source_documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    documents = torch.tensor([[0] * 3 + [1] * 4 + [2] * 2])
    packed = model(sources, targets, source_document_ids=source_documents, document_ids=documents)
    alone = [
        model(source, target)
        for source, target in zip(sources[:, :9].split([5, 4], 1), targets[:, :7].split([3, 4], 1), strict=True)
    ]
    assert torch.allclose(packed[:, :7], torch.cat(alone, dim=1), atol=1e-12)


def test_padding_of_a_source_and_of_a_row_changes_nothing() -> None:
    model, source, target = _model(), _ids(1, 5), _ids(1, 4, seed=2)
    padded = torch.cat([source, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    found = model(padded, target, source_document_ids=torch.tensor([[0] * 5 + [1] * 3]))
    assert torch.allclose(found, model(source, target), atol=1e-12)
    wide = torch.cat([target, torch.zeros(1, 2, dtype=torch.int64)], dim=1)
    found = model(
        source, wide, source_document_ids=torch.tensor([[0] * 5]), document_ids=torch.tensor([[0] * 4 + [1] * 2])
    )
    assert torch.allclose(found[:, :4], model(source, target), atol=1e-12)
    assert found.isfinite().all()


def test_a_target_depends_on_its_source_and_on_no_later_token() -> None:
    model, source, target = _model(), _ids(1, 5), _ids(1, 4, seed=2)
    logits, other = model(source, target), model(_ids(1, 5, seed=3), target)
    assert (logits - other).abs().amax(-1).min() > 1e-3
    changed = target.clone()
    changed[0, -1] = 30 - changed[0, -1]
    assert torch.equal(model(source, changed)[:, :3], logits[:, :3])


def test_token_by_token_is_as_whole_and_keys_of_sources_are_made_once(monkeypatch) -> None:
    model, sources, targets = _model(), _ids(2, 6), _ids(2, 5, seed=2)
    whole = model(sources, targets)
    given = model.given(sources)
    cross = [layer.mixer for layer in model.decoder.layers if isinstance(layer.mixer.part, CrossAttention)]
    calls = []
    for mixer in cross:
        mixer.k.register_forward_hook(lambda *_: calls.append(1))
    cache = given.make_cache(2, 5)
    steps = torch.cat([given(targets[:, n : n + 1], cache=cache) for n in range(5)], dim=1)
    assert torch.allclose(steps, whole, atol=1e-12)
    assert len(calls) == len(cross)
    cache.rewind(2)
    assert torch.allclose(given(targets[:, 3:], cache=cache), whole[:, 3:], atol=1e-12)
    cache.rewind(2)
    cache.select(torch.tensor([1, 1, 0]))
    again = given(targets[[1, 1, 0], 3:4], cache=cache)
    assert torch.allclose(again, whole[[1, 1, 0], 3:4], atol=1e-12)


def test_a_generator_writes_for_each_source_what_it_writes_alone() -> None:
    model, sources = _model(), _ids(3, 6)
    together = Generator(model.given(sources)).generate([[0]] * 3, sampling=GREEDY, max_new_tokens=5)
    for row in range(3):
        alone = Generator(model.given(sources[row : row + 1])).generate([[0]], sampling=GREEDY, max_new_tokens=5)
        assert alone[0].token_ids == together[row].token_ids
    assert len({completion.token_ids for completion in together}) > 1
    drawn = Generator(model.given(sources)).generate(
        [[0]] * 3, sampling=Sampling(seed=1), max_new_tokens=4, num_samples=2
    )
    assert len(drawn) == 6


def test_beams_are_searched_for_a_source() -> None:
    from lightning_lm.generation import beam_search

    model, source = _model(), _ids(1, 6)
    lm = model.given(source)
    ((best, *_),) = beam_search(lm, [[0]], num_beams=900, max_new_tokens=2, stop_ids=[29])
    logprobs = {}
    first = lm(torch.tensor([[0]])).log_softmax(-1)[0, 0]
    for token in range(30):
        if token == 29:
            logprobs[(token,)] = float(first[token])
            continue
        second = lm(torch.tensor([[0, token]])).log_softmax(-1)[0, 1]
        logprobs |= {(token, other): float(first[token] + second[other]) for other in range(30)}
    wanted = max(logprobs, key=lambda ids: logprobs[ids] / len(ids))
    assert tuple(best.token_ids) == wanted


def test_rows_that_are_no_sources_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"3 sources were given, and 2 rows"):
        Generator(_model().given(_ids(3, 6))).generate([[0]] * 2, sampling=GREEDY, max_new_tokens=2)


def test_a_source_longer_than_the_encoder_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"33 tokens.*context_length=32.*context_length=33"):
        _model().given(_ids(1, 33))


def test_parts_that_do_not_fit_are_refused() -> None:
    config = _config()
    with pytest.raises(ConfigurationError, match="decoder has no layers of CrossAttention"):
        EncoderDecoderConfig(encoder=config.encoder, decoder=config.encoder)
    with pytest.raises(ConfigurationError, match="reads encoded sources, and there are none"):
        config.decoder.build()(_ids(1, 3))


def test_the_config_survives_a_round_trip() -> None:
    config = _model().config
    assert EncoderDecoderConfig.from_dict(config.to_dict()) == config
