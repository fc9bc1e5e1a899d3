"""Models of recurrent mixers: packed rows, caches, padding, speculation and beams give what single rows give."""

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Generator, Sampling, Speculation, beam_search
from lightning_lm.models import (
    GLU,
    SSD,
    Attention,
    DeltaNet,
    FanIn,
    FixedDecay,
    GatedDecay,
    GatedDeltaNet,
    Hyena,
    Layer,
    LinearAttention,
    Mixer,
    Parallel,
    Recurrent,
    Transformer,
    TransformerConfig,
    WindowMLP,
    flops_per_token,
    parameter_roles,
)
from lightning_lm.optim import Muon

MIXERS: dict[str, Mixer] = {
    "linear": LinearAttention(num_heads=2),
    "retention": LinearAttention(num_heads=2, feature="identity", decay=FixedDecay(fastest=2)),
    "gla": LinearAttention(num_heads=2, feature="identity", decay=GatedDecay(rank=4), head_dim=4, v_head_dim=8),
    "delta": DeltaNet(num_heads=2),
    "gated delta": GatedDeltaNet(num_heads=2, num_v_heads=4, head_dim=6, v_head_dim=5),
    "ssd": SSD(head_dim=8, state=6, groups=2, conv=3),
    "lstm": Recurrent(hidden_size=12),
    "gru": Recurrent(cell="gru"),
    "rnn": Recurrent(cell="rnn"),
    "window": WindowMLP(order=4, hidden_size=12),
    "hyena": Hyena(length=40, filter_size=8, bands=3),
    "parallel": Parallel(mixers=(SSD(head_dim=8, state=4), Attention(num_heads=2))),
}
VOCAB = 31


def build(mixer: Mixer, *more: Layer, layers: int = 2) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=layers,
        layers=(Layer(mixer=mixer, ffn=None), *more),
        init=FanIn(),
        context_length=40,
    )
    return config.build().double().eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MIXERS, scope="module")
def model(request: pytest.FixtureRequest) -> Transformer:
    return build(MIXERS[request.param])


@torch.no_grad()
def test_packed_is_each_alone(model: Transformer) -> None:
    tokens, lengths = ids(1, 23), [1, 9, 2, 11]
    documents = torch.arange(2).repeat(2).repeat_interleave(torch.tensor(lengths))[None]
    alone = torch.cat([model(part) for part in tokens.split(lengths, 1)], 1)
    torch.testing.assert_close(model(tokens, document_ids=documents), alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_cached_is_one_pass(model: Transformer) -> None:
    tokens = ids(2, 20)
    whole, cache, parts = model(tokens), model.make_cache(2, 20), []
    for part in tokens.split([7, 1, 1, 9, 2], 1):
        parts.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[9, 1, 2], [1, 1, 3, 6, 1], [5, 7]])
def test_padding_on_the_left(model: Transformer, sizes: list[int]) -> None:
    """Rows that begin inside, at the border and in the middle of a pass."""
    tokens, starts = ids(3, 12), torch.tensor([0, 5, 8])
    alone = [model(tokens[row : row + 1, start:])[0] for row, start in enumerate(starts)]
    cache, parts = model.make_cache(3, 12, starts=starts), []
    for part in tokens.split(sizes, 1):
        parts.append(model(part, cache=cache))
    padded = torch.cat(parts, 1)
    for row, start in enumerate(starts):
        torch.testing.assert_close(padded[row, start:], alone[row], rtol=0, atol=1e-9)


@torch.no_grad()
def test_rows_are_rewound_by_themselves(model: Transformer) -> None:
    tokens, cache = ids(2, 12), model.make_cache(2, 20)
    cache.keep_newest(3)
    model(tokens[:, :8], cache=cache)
    model(ids(2, 3), cache=cache)
    cache.rewind(torch.tensor([3, 1]))
    rows = [
        torch.cat((tokens[:1, :8], tokens[:1, 8:]), 1),
        torch.cat((tokens[1:, :8], ids(2, 3)[1:, :2], tokens[1:, 8:]), 1),
    ]
    found = model(tokens[:, 8:], cache=cache)
    for row, text in enumerate(rows):
        torch.testing.assert_close(found[row], model(text)[0, -4:], rtol=0, atol=1e-9)
    cache.rewind(1)
    cache.select(torch.tensor([1, 1]))
    again = model(tokens[1:, 11:].expand(2, -1), cache=cache)
    torch.testing.assert_close(again[:, 0], found[1, -1].expand(2, -1), rtol=0, atol=1e-9)


def test_generation_of_a_batch_is_that_alone(model: Transformer) -> None:
    prompts = [ids(1, length)[0].tolist() for length in (1, 9, 4)]
    generator = Generator(model)
    greedy = Sampling(temperature=0.0)
    together = generator.generate(prompts, sampling=greedy, max_new_tokens=8)
    for prompt, completion in zip(prompts, together, strict=True):
        text = torch.tensor([prompt])
        for _ in range(8):
            text = torch.cat((text, model(text)[:, -1:].argmax(-1)), 1)
        assert list(completion.token_ids) == text[0, len(prompt) :].tolist()
    draft = Speculation(draft=build(GatedDeltaNet(num_heads=2), layers=1), num_tokens=3)
    drafted = Generator(model, speculation=draft).generate(prompts, sampling=greedy, max_new_tokens=8)
    assert [row.token_ids for row in drafted] == [row.token_ids for row in together]


def test_speculation_of_long_filters_reaches_the_end_of_the_text() -> None:
    """Going back leaves room in front of the shorter rows, for which the filters have no weights."""
    model = build(Hyena(length=32), layers=1)
    draft = Speculation(draft=build(Hyena(length=32), Layer(mixer=Hyena(length=32), ffn=None), layers=2), num_tokens=3)
    prompts, greedy = [ids(1, length)[0].tolist() for length in (3, 2)], Sampling(temperature=0.0)
    plain = Generator(model).generate(prompts, sampling=greedy, max_new_tokens=20)
    drafted = Generator(model, speculation=draft).generate(prompts, sampling=greedy, max_new_tokens=20)
    assert [row.token_ids for row in drafted] == [row.token_ids for row in plain]


@torch.no_grad()
def test_beams_follow_the_model(model: Transformer) -> None:
    prompt = ids(1, 5)
    (beams,) = beam_search(model, [prompt[0].tolist()], num_beams=3, max_new_tokens=4, length_penalty=0.0)
    for beam in beams:
        text = torch.cat((prompt, torch.tensor([beam.token_ids])), 1)
        logprobs = model(text)[0, 4:-1].log_softmax(-1)
        score = logprobs.gather(1, text[0, 5:, None]).sum()
        assert beam.score == pytest.approx(float(score), abs=1e-6)


def test_gradients_with_checkpoints_and_half_precision(model: Transformer) -> None:
    tokens = ids(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.float()
        loss = model(tokens).float().logsumexp(-1).mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    model.double()


def test_a_mixture_of_layers() -> None:
    model = build(
        GatedDeltaNet(num_heads=2),
        Layer(mixer=SSD(head_dim=8, state=4)),
        Layer(mixer=Attention(num_heads=2), ffn=GLU()),
        layers=3,
    )
    tokens, cache = ids(2, 9), model.make_cache(2, 9)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split([5, 4], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", MIXERS)
def test_a_model_made_without_values(case: str) -> None:
    """FLOPs are counted on the meta device; afterwards every value can be set."""
    config = dataclasses.replace(build(MIXERS[case]).config, init=FanIn())
    with torch.device("meta"):
        model = config.build()
    assert flops_per_token(config, 16) > 0
    model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))
    again = config.build()
    again.init_weights(torch.Generator().manual_seed(0))
    for (name, left), right in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(left, right, msg=name)


def test_state_stays_as_large() -> None:
    model = build(GatedDeltaNet(num_heads=2))
    cache = model.make_cache(1, 30)
    sizes = []
    with torch.no_grad():
        for length in (2, 20):
            model(ids(1, length), cache=cache)
            sizes.append(sum(values.numel() for layer in cache.layers for values in layer.memory))  # type: ignore[attr-defined]
    assert sizes[0] == sizes[1]


def test_roles_and_flops() -> None:
    model = build(SSD(head_dim=8, state=6, groups=2))
    roles = parameter_roles(model)
    assert roles["layers.0.mixer.conv_x.weight"] == "conv"
    small = [name for name in roles if name.endswith(("A_log", "dt_bias", "skip.weight"))]
    assert len(small) == 6
    assert {roles[name] for name in small} == {"vector"}
    assert flops_per_token(model, 64) == flops_per_token(model, 4096)
    state = 3 * 4 * 32 * 6  # per layer: forward and backward, read and write, 32 features of 6 numbers
    plain = 6 * sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name)
    assert flops_per_token(model, 64) == plain + 2 * state


def test_initial_values_survive_the_initialisation() -> None:
    mixer = build(SSD(head_dim=8, state=6)).layers[0].mixer
    rates, bias = mixer.time_step.A_log.exp(), mixer.time_step.dt_bias
    assert rates.min() >= 1
    assert rates.max() <= 16
    steps = torch.nn.functional.softplus(bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 1.01e-1
    assert mixer.conv_x.weight.abs().max() <= 0.5
    assert mixer.conv_x.weight.std() > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedDeltaNet(num_heads=2, window=8), "window=8"),  # type: ignore[call-arg]
        (lambda: build(GatedDeltaNet(num_heads=3)), "num_heads=3 does not divide d_model=16"),
        (lambda: GatedDeltaNet(num_heads=2, num_v_heads=3), "does not divide num_v_heads=3"),
        (lambda: build(LinearAttention(num_heads=5)), "num_heads=5 does not divide d_model=16"),
        (lambda: build(SSD(head_dim=12)), "head_dim=12 does not divide"),
        (lambda: build(SSD(head_dim=8, groups=3)), "groups=3 does not divide the 4 heads"),
        (lambda: build(Hyena(length=8))(ids(1, 9)), "Hyena\\(length=8\\)"),
        (lambda: build(Hyena(length=8)).make_cache(1, 9), "Hyena\\(length=8\\)"),
        (lambda: Parallel(mixers=(Attention(),)), "two or more"),
        (lambda: LinearAttention(feature="identity"), "FixedDecay"),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()  # type: ignore[operator]


def test_no_snapshots_no_way_back() -> None:
    model = build(DeltaNet(num_heads=2))
    cache = model.make_cache(1, 9)
    with torch.no_grad():
        model(ids(1, 4), cache=cache)
    with pytest.raises(ConfigurationError, match="keep_newest"):
        cache.rewind(1)


def test_hyena_reads_packed_rows_longer_than_its_filters() -> None:
    model = build(Hyena(length=8))
    tokens = ids(1, 16)
    with torch.no_grad():
        packed = model(tokens, document_ids=torch.arange(2).repeat_interleave(8)[None])
        torch.testing.assert_close(packed[:, 8:], model(tokens[:, 8:]), rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_cells_are_those_of_torch(cell: Literal["lstm", "gru", "rnn"]) -> None:
    mixer = build(Recurrent(cell=cell, hidden_size=12)).layers[0].mixer
    theirs = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell](16, 12, batch_first=True).double()
    theirs.weight_ih_l0.copy_(mixer.input_weight.flatten(0, 1))
    theirs.weight_hh_l0.copy_(mixer.state_weight.flatten(0, 1))
    theirs.bias_ih_l0.copy_(mixer.bias)
    theirs.bias_hh_l0.zero_()
    if cell == "lstm":
        theirs.bias_hh_l0[12:24] = 1.0  # the forget gate
    x = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(mixer(x), mixer.o(theirs(x)[0]), rtol=0, atol=1e-12)


def test_gradients_of_packed_rows_are_those_of_documents_alone() -> None:
    model, tokens = build(Recurrent(hidden_size=12)), ids(2, 40)
    documents = torch.arange(5).repeat_interleave(torch.tensor([1, 17, 3, 3, 16])).expand(2, -1)
    weights = torch.randn(2, 40, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (model(tokens, document_ids=documents) * weights).sum().backward()
    packed = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    for row in range(2):
        for document in range(5):
            here = documents[row] == document
            (model(tokens[row, here][None]) * weights[row, here]).sum().backward()
    for found, parameter in zip(packed, model.parameters(), strict=True):
        assert found is not None
        torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-9)


def test_each_gate_is_a_matrix_of_its_own() -> None:
    model = build(Recurrent(hidden_size=12), layers=1)
    gates = {name: p for name, p in model.named_parameters() if name.endswith(("input_weight", "state_weight"))}
    assert [tuple(p.shape) for p in gates.values()] == [(4, 12, 16), (4, 12, 12)]
    assert {parameter_roles(model)[name] for name in gates} == {"matrix"}
    alone = nn.ModuleList(nn.Linear(p.size(2), 12, bias=False) for p in gates.values() for _ in range(4)).double()
    model(ids(2, 9)).logsumexp(-1).mean().backward()
    for linear, weight, gradient in zip(
        alone,
        [gate for p in gates.values() for gate in p.detach()],
        [gate for p in gates.values() for gate in p.grad],  # type: ignore[union-attr]
        strict=True,
    ):
        linear.weight = nn.Parameter(weight.clone())
        linear.weight.grad = gradient.clone()
    for module in (model, alone):
        Muon(lr=0.1, weight_decay=0.0).build(module, parameter_roles(module)).step()
    found = [gate for p in gates.values() for gate in p.detach()]
    for linear, weight in zip(alone, found, strict=True):
        torch.testing.assert_close(weight, linear.weight.detach(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_window_is_the_network_of_bengio() -> None:
    mixer = build(WindowMLP(order=4, hidden_size=12)).layers[0].mixer
    x = torch.randn(1, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    h = torch.cat([step.weight for step in mixer.steps], 1)  # H, over the concatenated embeddings
    for column in range(6):
        inputs = [x[0, column - back] if column >= back else torch.zeros(16).double() for back in range(3)]
        expected = mixer.o(torch.tanh(mixer.steps[0].bias + h @ torch.cat(inputs)))
        torch.testing.assert_close(mixer(x)[0, column], expected, rtol=0, atol=1e-12)
    with pytest.raises(ConfigurationError, match="order=1"):
        WindowMLP(order=1)
