"""Maximal update parametrisation: the tables of its paper, the standard one at the base width, flat coordinates."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import (
    MLP,
    Attention,
    DepthScaled,
    FanIn,
    Layer,
    MuP,
    MuPAttention,
    Normal,
    TransformerConfig,
    TruncatedNormal,
    parameter_roles,
)
from lightning_lm.optim import SGD, AdamW, Muon, MuPRates, OptimizerPart
from lightning_lm.parts import Part

BASE, VOCAB = 16, 64
RULES = {
    # Yang et al. 2022, arXiv:2203.03466, table 3: powers of the width in the learning rate, for input weights and
    # biases, hidden weights, and output weights ("fan_in" and "fan_out" are the width where they can grow).
    "SGD": {"embedding": 1, "vector": 1, "matrix": 0, "head": -1},
    "AdamW": {"embedding": 0, "vector": 0, "matrix": -1, "head": -1},
    # Muon's step is orthogonal; Yang, Simon and Bernstein 2023, arXiv:2310.17813, condition 1, asks for that size.
    "Muon": {"embedding": 0, "vector": 0, "matrix": 0, "head": -1},
}
OPTIMIZERS = {
    "SGD": SGD(lr=0.5, weight_decay=0.1),
    "AdamW": AdamW(lr=0.01),
    "Muon": Muon(lr=0.02, adamw=AdamW(lr=0.01)),
}


def config(width, *, init=Normal(std=0.1), layers=None, **changes):
    layers = layers or Layer(mixer=Attention(num_heads=width // 8, bias="all"), ffn=MLP())
    settings = {"vocab_size": VOCAB, "d_model": width, "num_layers": 2, "layers": layers, "context_length": 16}
    return TransformerConfig(**settings, init=init, **changes)


def made(described, seed=0):
    model = described.build()
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def rows(steps):
    return torch.randint(VOCAB, (steps, 4, 17), generator=torch.Generator().manual_seed(1))


def trained(model, part, steps=3):
    optimizer = part.build(model, parameter_roles(model))
    for batch in rows(steps):
        logits = model(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_the_base_width_nothing_changes(name):
    part = OPTIMIZERS[name]
    plain = trained(made(config(BASE)), part)
    scaled = trained(
        made(config(BASE, init=MuP(base_width=BASE, base=Normal(std=0.1)))), MuPRates(base_width=BASE, optimizer=part)
    )
    for (key, value), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_are_those_of_the_table(name):
    model = made(config(4 * BASE))
    roles = parameter_roles(model)
    optimizer = MuPRates(base_width=BASE, optimizer=OPTIMIZERS[name]).build(model, roles)
    before = OPTIMIZERS[name].build(model, roles)
    plain = {key: group for group in before.param_groups for key in group["param_names"]}
    seen = set()
    for group in optimizer.param_groups:
        for key in group["param_names"]:
            assert group["lr"] == pytest.approx(plain[key]["lr"] * 4.0 ** RULES[name][roles[key]]), key
            decay = plain[key]["lr"] * plain[key]["weight_decay"]
            assert group["lr"] * group["weight_decay"] == pytest.approx(decay), key
            seen.add(roles[key])
    assert seen == set(RULES[name])
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)
    assert optimizer.param_groups[0]["lr"] == before.param_groups[0]["lr"] or name == "SGD"


def test_a_step_of_muon_that_grows_with_the_width_is_shrunk():
    part = MuPRates(base_width=BASE, optimizer=Muon(lr=0.02, scaling="match_adamw"))
    model = made(config(4 * BASE))
    groups = part.build(model, parameter_roles(model)).param_groups
    assert [group["lr"] for group in groups if group["name"].startswith("muon")] == [pytest.approx(0.02 / 2)]


@pytest.mark.parametrize("base", [Normal(std=0.1), DepthScaled(std=0.1), TruncatedNormal(std=0.1, embedding_std=0.1)])
def test_initial_weights_are_those_of_the_table(base):
    """Standard deviations over those of the base; variance 1/fan_in for hidden, 1/fan_in^2 for output weights."""
    powers = {"embedding": 0, "matrix": -0.5, "head": -1}
    described = config(4 * BASE, init=base)
    plain, scaled = made(described), made(dataclasses.replace(described, init=MuP(base_width=BASE, base=base)))
    for (name, role), value, other in zip(
        parameter_roles(plain).items(), plain.parameters(), scaled.parameters(), strict=True
    ):
        torch.testing.assert_close(other, value * 4.0 ** powers.get(role, 0), msg=name)


class Table8(nn.Module):
    """An MLP on tokens in the form of the paper's table 8: the output is divided by the width, its weights are not."""

    def __init__(self, model, wider):
        super().__init__()
        weights = (model.embed.weight, model.mix.weight, model.head.weight * wider)
        self.embed, self.mix, self.head = (nn.Parameter(weight.detach().clone()) for weight in weights)
        self.multiplier = 1 / wider

    def forward(self, ids):
        return self.multiplier * torch.tanh(self.embed[ids] @ self.mix.T) @ self.head.T


class Network(nn.Module):
    """The same network, as our parts train it: without a multiplier."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCAB, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


def test_training_is_that_of_table_8():
    """Table 3 and table 8 are two forms of one parametrisation (lemma J.1); `mup` has the other."""
    wider, lr = 8, 0.05
    torch.manual_seed(0)
    ours = Network(wider * BASE).double()
    MuP(base_width=BASE, base=Normal(std=0.3)).apply(ours, num_layers=1)
    theirs = Table8(ours, wider)
    part = MuPRates(base_width=BASE, optimizer=AdamW(lr=lr, eps=1e-30, weight_decay=0.1))
    mine = part.build(ours, parameter_roles(ours))
    groups = [  # table 8, row "Adam LR": input 1, output 1, hidden 1 / fan_in
        {"params": [theirs.embed, theirs.head]},
        {"params": [theirs.mix], "lr": lr / wider, "weight_decay": 0.1 * wider},
    ]
    other = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-30, weight_decay=0.1)
    for batch in rows(5):
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
    torch.testing.assert_close(ours(batch), theirs(batch), rtol=1e-9, atol=1e-9)
    assert (ours(batch) - ours.head(torch.zeros(1, wider * BASE).double())).abs().max() > 0.1  # it has learned


def slopes(build, part):
    """Powers of the width by which three steps move the outputs of modules (Yang et al. 2022, appendix D.1)."""
    widths, moved = (32, 64, 128, 256), {}
    for width in widths:
        model = made(build(width), seed=width)
        batch = rows(1)[0][:, :-1]
        before, after = coordinates(model, batch), coordinates(trained(model, part(width)), batch)
        for name, value in before.items():
            moved.setdefault(name, []).append((after[name] - value).square().mean().sqrt().item())
    x = torch.tensor([math.log(width) for width in widths])
    x = x - x.mean()
    return {name: float((x * torch.tensor(sizes).log()).sum() / x.square().sum()) for name, sizes in moved.items()}


def coordinates(model, batch):
    seen = {}
    watched = {"head": model.head, "up": model.layers[1].ffn.up, "o": model.layers[1].mixer.o}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.detach()}))
        for name, module in watched.items()
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_coordinates_are_flat_over_widths_and_grow_under_the_standard_parametrisation(name):
    part, init = OPTIMIZERS[name], Normal()
    flat = slopes(
        lambda width: config(width, init=MuP(base_width=BASE, base=init)),
        lambda _: MuPRates(base_width=BASE, optimizer=part),
    )
    assert all(abs(power) < 0.15 for power in flat.values()), flat
    growing = slopes(lambda width: config(width, init=init), lambda _: part)
    assert all(power > 0.4 for power in growing.values()), growing


def test_scores_of_wide_heads_are_divided_by_their_width():
    attention = MuPAttention(num_heads=2, base_head_dim=8)
    wide, base = (made(config(width, layers=Layer(mixer=attention))) for width in (64, 16))
    assert wide.layers[0].mixer.part.scale == pytest.approx(8**0.5 / 32)
    plain = made(config(16, layers=Layer(mixer=Attention(num_heads=2))))
    ids = rows(1)[0]
    assert torch.equal(base(ids), plain(ids))
    with pytest.raises(ConfigurationError, match=r"leave scale=0\.5 out"):
        MuPAttention(scale=0.5)


def test_a_model_of_transformers_is_understood_by_its_roles():
    sizes = {"vocab_size": 97, "hidden_size": 4 * BASE, "intermediate_size": 96, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4))
    optimizer = MuPRates(base_width=BASE, optimizer=AdamW(lr=0.4)).build(model, parameter_roles(model))
    rates = {key: group["lr"] for group in optimizer.param_groups for key in group["param_names"]}
    assert rates["model.embed_tokens.weight"] == rates["model.norm.weight"] == 0.4
    assert rates["lm_head.weight"] == rates["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.1)


class Unknown(AdamW):
    width_power = OptimizerPart.width_power


def test_what_cannot_be_scaled_is_refused():
    tied = config(BASE, tie_embeddings=True)
    with pytest.raises(ConfigurationError, match="tie_embeddings to false"):
        MuPRates(base_width=BASE).build(made(tied), parameter_roles(made(tied)))
    with pytest.raises(ConfigurationError, match="tie_embeddings to false"):
        made(dataclasses.replace(tied, init=MuP(base_width=BASE)))
    with pytest.raises(ConfigurationError, match="Give Normal"):
        MuP(base_width=BASE, base=FanIn())
    with pytest.raises(ConfigurationError, match="Give Normal"):
        MuP(base_width=BASE, base=TruncatedNormal())
    layer = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ConfigurationError, match="Give width"):
        MuPRates(base_width=4).build(layer, parameter_roles(layer))
    assert MuPRates(base_width=4, width=8).build(layer, parameter_roles(layer)).param_groups[-1]["lr"] == 3e-4
    with pytest.raises(ConfigurationError, match="neither an embedding nor a head"):
        MuP(base_width=4).apply(layer, num_layers=1)
    for part in (MuP, MuPRates):
        with pytest.raises(ConfigurationError, match="too small"):
            part(base_width=0)
    with pytest.raises(ConfigurationError, match="Define its width_power"):
        MuPRates(base_width=4, width=8, optimizer=Unknown()).build(layer, parameter_roles(layer))


def test_parts_survive_a_checkpoint():
    for part in (MuP(base_width=8), MuPRates(base_width=8, optimizer=Muon()), MuPAttention(base_head_dim=8)):
        assert Part.from_dict(part.to_dict()) == part
