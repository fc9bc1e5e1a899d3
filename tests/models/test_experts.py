"""The layer of experts: a loop over tokens in float64, types, compilation, and what it refuses."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_lm.errors import ConfigurationError
from lightning_lm.kernels import grouped_linear
from lightning_lm.models import (
    GLU,
    MLP,
    Attention,
    FanIn,
    Groups,
    HashRouter,
    LaggedLoss,
    Layer,
    LoadBias,
    MoE,
    SequenceLoss,
    TopK,
    TransformerConfig,
    collect_auxiliary,
    parameter_roles,
)

PART = MoE(experts=GLU(hidden_size=6), num_experts=5, router=TopK(k=2))


def built(part=PART, d_model=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = part.build(d_model)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.to(dtype)


def numbers(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loop(layer, x):
    """Each token through each of its experts, one after another."""
    part, weights = layer.part, dict(layer.named_parameters())
    bias = torch.zeros(part.num_experts) if layer.balance is None else layer.balance.bias
    outputs = []
    for token in x.flatten(0, -2):
        scores = (weights["router.weight"] @ token).sigmoid()
        best = (scores + (0 if bias is None else bias)).topk(part.router.k).indices.tolist()
        total = sum(scores[expert] for expert in best)
        out = torch.zeros_like(token)
        for expert in best:
            hidden = weights["experts.up.weight"][expert] @ token
            if "experts.up.bias" in weights:
                hidden = hidden + weights["experts.up.bias"].view(part.num_experts, -1)[expert]
            if "experts.gate.weight" in weights:
                hidden = torch.nn.functional.silu(weights["experts.gate.weight"][expert] @ token) * hidden
            else:
                hidden = torch.nn.functional.gelu(hidden)
            result = weights["experts.down.weight"][expert] @ hidden
            if "experts.down.bias" in weights:
                result = result + weights["experts.down.bias"].view(part.num_experts, -1)[expert]
            out = out + scores[expert] / total * result
        outputs.append(out)
    found = torch.stack(outputs).view(x.shape)
    if layer.shared is not None:
        found = found + layer.shared(x) * layer.shared_gate(x).sigmoid()
    return found


@pytest.mark.parametrize(
    "part",
    [
        PART,
        dataclasses.replace(PART, experts=MLP(hidden_size=7, bias=True)),
        dataclasses.replace(PART, shared=GLU(hidden_size=4), shared_gate=True, balance=None),
    ],
    ids=["glu", "mlp with biases", "shared and gated"],
)
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(part):
    layer, x = built(part), numbers(2, 6, 8)
    if layer.balance is not None:
        layer.balance.bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1, -0.1]))
    upstream = numbers(2, 6, 8, seed=2)
    found = []
    for function in (layer, lambda x: loop(layer, x)):
        given = x.clone().requires_grad_()
        gradients = torch.autograd.grad((function(given) * upstream).sum(), [given, *layer.parameters()])
        found.append((function(given), *gradients))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_experts_that_nobody_chooses_get_zero_gradients():
    layer = built()
    layer.balance.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))
    layer(numbers(1, 4, 8)).square().sum().backward()
    assert layer.experts.up.weight.grad[2:].abs().max() == 0
    assert layer.experts.up.weight.grad[:2].abs().min() > 0


def test_router_and_bias_stay_in_float32_under_every_precision():
    layer, x = built(dtype=torch.bfloat16), numbers(2, 6, 8, dtype=torch.bfloat16)
    assert layer.balance.bias.dtype == torch.float32
    assert layer.router(x.flatten(0, 1), None, None).logits.dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16
    single = built(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert single.router(x.flatten(0, 1).float(), None, None).logits.dtype == torch.float32
        assert single(x.float()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), built()(x.double()), rtol=0.1, atol=0.1)


def test_grouped_products_compile_whole_and_take_any_size():
    x, weight, counts = numbers(7, 3), numbers(4, 5, 3), torch.tensor([3, 0, 4, 0])
    expected = torch.cat([x[:3] @ weight[0].t(), x[3:] @ weight[2].t()])
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grouped_linear(x, weight, counts), expected)
    torch.testing.assert_close(compiled(x, weight, counts), expected)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, counts), (x, weight))


def model_of(part, dtype=torch.float64, **settings):
    layers = Layer(mixer=Attention(num_heads=2), ffn=part)
    config = TransformerConfig(vocab_size=17, d_model=8, num_layers=2, layers=layers, context_length=32, **settings)
    torch.manual_seed(0)
    return config.build().to(dtype)


ROUTERS = [
    TopK(k=2),
    TopK(k=2, score="softmax", normalise=False, scale=2.0, groups=Groups(count=2, chosen=1)),
    HashRouter(k=3, seed=5),
]


@pytest.mark.parametrize("router", ROUTERS, ids=["sigmoid", "groups", "hash"])
def test_packed_padded_and_cached_rows_are_each_document_alone(router):
    model = model_of(MoE(experts=GLU(hidden_size=6), num_experts=6, router=router)).eval()
    first, second = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[9, 2, 6]])
    alone = [model(first), model(second)]
    packed = model(torch.cat((first, second), 1), document_ids=torch.tensor([[0] * 5 + [1] * 3]))
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)
    cache = model.make_cache(2, 8, starts=torch.tensor([0, 2]))
    rows = torch.cat((first, torch.tensor([[0, 0, 9, 2, 6]])))
    steps = [model(rows[:, :3], cache=cache)] + [model(rows[:, i : i + 1], cache=cache) for i in (3, 4)]
    torch.testing.assert_close(torch.cat(steps, 1)[0], alone[0][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat(steps, 1)[1, 2:], alone[1][0], rtol=1e-9, atol=1e-9)


def test_capacity_drops_in_training_and_never_in_evaluation():
    part = dataclasses.replace(PART, capacity_factor=0.25)
    layer, x = built(part), numbers(1, 20, 8)
    assert torch.equal(layer.eval()(x), built().eval()(x))
    dropped = layer.train()(x)
    assert (dropped == 0).all(-1).any()


def test_loads_leave_out_padding_and_recomputed_passes():
    part = dataclasses.replace(PART, balance=LaggedLoss(weight=1.0), z_loss=0.5)
    layer = model_of(part).layers[0]
    x, counted = numbers(1, 6, 8).requires_grad_(), torch.tensor([[True] * 4 + [False] * 2])
    results = []
    for recompute in (False, True):
        with collect_auxiliary() as loads:
            context = layer.mixer._context(x, None)
            context.counted = counted
            run = (lambda x, c: checkpoint(layer, x, c, use_reentrant=False)) if recompute else layer
            total = run(x, context).sum() + loads[0].loss
        seen = list(loads)
        gradient = torch.autograd.grad(total, [x, layer.ffn.router.weight])
        assert len(seen) == 1
        assert seen[0].counts.sum() == 8
        assert seen[0].sums[0] == 4
        results.append(gradient)
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_stacks_have_the_spread_of_their_own_inputs_and_their_roles():
    part = MoE(experts=GLU(hidden_size=32, bias=True), num_experts=8, router=TopK(k=2, bias=True), shared=GLU())
    config = TransformerConfig(vocab_size=9, d_model=64, num_layers=1, layers=Layer(ffn=part), init=FanIn())
    torch.manual_seed(0)
    model = config.build()
    ffn = model.layers[0].ffn
    assert float(ffn.experts.up.weight.detach().std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(ffn.experts.down.weight.detach().std()) == pytest.approx(32**-0.5, rel=0.05)
    assert ffn.experts.up.bias.abs().max() == 0
    roles = parameter_roles(ffn)
    assert roles["router.weight"] == "router"
    assert roles["experts.down.weight"] == "matrix"
    assert roles["experts.down.bias"] == roles["router.bias"] == "vector"


def test_ids_are_spread_over_experts_and_each_goes_to_different_ones():
    layer = MoE(experts=GLU(hidden_size=2), num_experts=7, router=HashRouter(k=3), balance=None).build(4)
    choices = layer.router(torch.zeros(7000, 4), torch.arange(7000), None).choices
    counts = choices.experts.flatten().bincount()
    assert counts.min() > 2700
    assert counts.max() < 3300
    assert (choices.experts.sort(-1).values.diff() > 0).all()
    assert (choices.weights == torch.tensor(1 / 3)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoE(num_experts=4, router=TopK(k=5)), "k=5 experts per token are more than num_experts=4; use k"),
        (lambda: MoE(num_experts=6, router=TopK(groups=Groups(count=4, chosen=2))), "use 1, 2, 3, 6"),
        (lambda: MoE(num_experts=4, router=TopK(groups=Groups(count=4, chosen=2))), "more than the 1 experts"),
        (lambda: MoE(num_experts=8, router=TopK(k=3, groups=Groups(count=4, chosen=1))), "chosen from 2 to 4"),
        (lambda: MoE(num_experts=8, router=TopK(k=3, groups=Groups(count=4, chosen=5))), "chosen from 2 to 4"),
        (lambda: MoE(shared_gate=True), "give shared=GLU"),
        (lambda: MoE(router=HashRouter(), balance=SequenceLoss()), "nothing for z_loss=0.0 and balance"),
        (lambda: MoE(router=HashRouter(), z_loss=0.1), "Set z_loss=0"),
        (lambda: MoE(experts=PART).build(8), "Experts of MoE cannot be stacked"),
        (lambda: MoE(router=HashRouter()).build(8)(torch.zeros(1, 2, 8)), "HashRouter chooses experts by token ids"),
        (lambda: LoadBias(rate=-1.0), "at least 0"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_the_bias_of_a_frozen_router_stays():
    layer = MoE(experts=GLU(hidden_size=8), num_experts=4, balance=LoadBias(rate=0.1)).build(8)
    loads = torch.tensor([9.0, 1.0, 1.0, 1.0])
    layer.router.requires_grad_(False)
    layer.end_step(loads)
    assert torch.equal(layer.balance.bias, torch.zeros(4))
    layer.router.requires_grad_(True)
    layer.end_step(loads)
    assert layer.balance.bias[0] < 0
