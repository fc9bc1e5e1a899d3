"""The optimizer by itself: who has what, and what others see of it."""

import pytest
import torch
from optimizer_runs import SPLIT
from torch import distributed, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.optim import CombinedOptimizer, MuonOptimizer
from lightning_lm.strategies import ShardedOptimizer, ShardedOptimizerStrategy
from lightning_lm.strategies.zero.partition import Piece, Placed, place


def gpt2_shapes():
    block = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
    ]
    return [(50257, 768), (1024, 768), *(12 * [*block, (768,)]), (768,), (768,)]


def loads(placements, shapes, num_ranks):
    load = [0] * num_ranks
    for shape, pieces in zip(shapes, placements, strict=True):
        for piece in pieces:
            load[piece.rank] += (piece.stop - piece.start) * torch.Size(shape[1:]).numel()
    return load


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_gpt2_is_balanced(num_ranks):
    shapes = gpt2_shapes()
    assert sum(torch.Size(shape).numel() for shape in shapes) == 124_439_808  # as published
    load = loads(place([Placed(shape, True) for shape in shapes], num_ranks), shapes, num_ranks)
    assert sum(load) == 124_439_808
    assert max(load) * num_ranks <= 1.05 * sum(load)
    whole = loads(place([Placed(shape, False) for shape in shapes], num_ranks), shapes, num_ranks)
    assert sum(whole) == sum(load)
    assert max(whole) >= 50257 * 768  # the embedding alone: why it is split


def test_rows_are_cut_as_torch_cuts_them():
    (pieces,) = place([Placed((97, 20), True)], 4, min_split_elements=1)
    sizes = [len(part) for part in torch.zeros(97, 20).chunk(4)]
    assert [piece.stop - piece.start for piece in pieces] == sizes
    assert place([Placed((), True), Placed((3, 10**6), False)], 2) == [(Piece(1, 0, 1),), (Piece(0, 0, 3),)]


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 30))


def step(model, optimizer, seed):
    optimizer.zero_grad()
    model(torch.randn(8, 40, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    optimizer.step()


def held_elements():
    model = layers()
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.Adagrad, lr=0.1, min_split_elements=SPLIT)
    step(model, optimizer, 0)  # Adagrad makes its state at once: what is not needed must go
    return sum(state["sum"].numel() for state in optimizer.state.values())


def test_each_rank_has_its_part_of_the_state(ranks):
    total = sum(param.numel() for param in layers().parameters())
    held = ranks(2).run(held_elements)
    assert sum(held) == total
    assert max(held) < 0.55 * total


def with_a_later_group():
    seen = []
    for wrap in (lambda optimizer: optimizer, lambda optimizer: ShardedOptimizer(optimizer, min_split_elements=SPLIT)):
        model = layers()
        optimizer = wrap(torch.optim.AdamW(model[0].parameters(), lr=0.1))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(getattr(optimizer, "inner", optimizer), 0.5)
        calls = []
        optimizer.register_step_post_hook(
            lambda taker, args, kwargs, calls=calls: calls.append(sum(len(g["params"]) for g in taker.param_groups))
        )
        step(model, optimizer, 0)
        optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.01})
        step(model, optimizer, 1)
        scheduler.step()
        step(model, optimizer, 2)
        seen.append(
            ([p.detach().clone() for p in model.parameters()], [g["lr"] for g in optimizer.param_groups], calls)
        )
    return seen


def test_groups_schedules_and_hooks_are_those_of_the_plain_optimizer(ranks):
    for (wanted, rates, calls), (found, found_rates, found_calls) in ranks(2).run(with_a_later_group):
        assert found_rates == rates == pytest.approx([0.05, 0.005])
        assert found_calls == calls == [2, 4, 4]  # a hook sees every parameter on every rank
        for value, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-7)


def loaded_by_name():
    model = layers()
    named = dict(model.named_parameters())

    def combined(order):
        matrices = [(name, named[name]) for name in order if named[name].dim() == 2]
        rest = [(name, named[name]) for name in order if named[name].dim() == 1]
        return CombinedOptimizer([torch.optim.AdamW(rest, lr=0.1), MuonOptimizer(matrices, lr=0.1)])

    first = ShardedOptimizer(combined(list(named)), min_split_elements=SPLIT)
    step(model, first, 0)
    state = [first.full_state_dict()]
    distributed.broadcast_object_list(state)
    other = ShardedOptimizer(combined(list(reversed(named))), min_split_elements=SPLIT)
    other.load_state_dict(state[0])
    back = other.full_state_dict()
    if back is None:
        return None
    return [
        {n: s["state"][i] for g in s["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
        for s in (state[0], back)
    ]


def test_states_are_found_by_name_where_the_optimizer_goes_by_names(ranks):
    first, other = ranks(2).run(loaded_by_name)[0]
    torch.testing.assert_close(other, first, rtol=0, atol=0)


def scaled(fused):
    model = layers()
    optimizer = ShardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused), min_split_elements=SPLIT)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for overflow in (False, True):
        optimizer.zero_grad()
        loss = model(torch.ones(1, 40)).square().mean()
        scaler.scale(loss).backward()
        if overflow:
            model[1].bias.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    return model[1].bias.detach(), scaler.get_scale()


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_sees_all_gradients(ranks, fused):
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 40)).square().mean().backward()
    optimizer.step()
    for bias, scale in ranks(2).run(scaled, fused):
        torch.testing.assert_close(bias, model[1].bias.detach(), rtol=1e-5, atol=1e-6)
        assert scale == 2.0**9  # halved once, on every rank


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ShardedOptimizer(layers().parameters()), "no class of optimizer"),
        (lambda: ShardedOptimizer(torch.optim.SGD(layers().parameters()), lr=1), "give it the optimizer alone"),
        (lambda: ShardedOptimizerStrategy(stage=3), "use ShardedModelStrategy"),
        (lambda: ShardedOptimizerStrategy(stage=2, static_graph=True), "cannot work with static_graph"),
        (lambda: ShardedOptimizerStrategy(model_averaging_period=2), "cannot work with model_averaging_period"),
    ],
)
def test_what_cannot_work_is_refused(make, said):
    with pytest.raises(ConfigurationError, match=said):
        make()
