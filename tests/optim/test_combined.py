"""One optimizer made of several: whatever expects a torch optimizer works with it."""

import io

import pytest
import torch
from torch import nn

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.optim import CombinedOptimizer, MuonOptimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def children(net: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [(name, param) for name, param in net.named_parameters() if param.ndim == 2]
    vectors = [(name, param) for name, param in net.named_parameters() if param.ndim == 1]
    return [
        MuonOptimizer([{"params": matrices, "name": "muon"}], lr=0.05, weight_decay=0.1),
        torch.optim.AdamW([{"params": vectors, "name": "adamw"}], lr=0.01, fused=True),
    ]


def train(net: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, *, start: int = 0) -> None:
    for step in range(start, start + steps):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(inputs).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_steps_like_its_children_alone():
    together, apart = network(), network()
    train(together, [CombinedOptimizer(children(together))], 4)
    train(apart, children(apart), 4)
    assert same(together, apart)


def test_groups_and_state_are_the_childrens():
    optimizer = CombinedOptimizer(children(network()))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [group["name"] for group in optimizer.param_groups] == ["muon", "adamw"]
    for child in optimizer.children:
        assert child.state is optimizer.state
    assert optimizer.param_groups[0] is optimizer.children[0].param_groups[0]
    assert optimizer.param_groups[1] is optimizer.children[1].param_groups[0]


def test_schedulers_reach_the_children():
    net = network()
    optimizer = CombinedOptimizer(children(net))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(net, [optimizer], 1)
    scheduler.step()
    before = [param.detach().clone() for param in net.parameters()]
    train(net, [optimizer], 2, start=1)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_the_gradient_scaler_unscales_and_skips():
    scaled, plain = network(), network()
    optimizer, reference = CombinedOptimizer(children(scaled)), CombinedOptimizer(children(plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for weight in (1.0, float("inf"), 1.0):
        for net, steps in ((scaled, True), (plain, weight == 1.0)):
            net.zero_grad()
            loss = net(torch.ones(1, 4)).square().sum() * weight
            if net is scaled:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            elif steps:
                loss.backward()
                reference.step()
    assert scaler.get_scale() < 1024.0
    for mine, other in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_evaluates_the_closure_once():
    net = network()
    optimizer = CombinedOptimizer(children(net))
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        net(torch.ones(1, 4)).sum().backward()
        return 7.0

    with torch.no_grad():
        assert optimizer.step(closure) == 7.0
    assert calls == [True]


@pytest.mark.parametrize("named", [True, False])
def test_goes_on_bit_for_bit_from_a_file(named):
    def make(net: nn.Module) -> CombinedOptimizer:
        parts = children(net)
        if not named:
            for part in parts:
                del part.param_groups[0]["param_names"]
        return CombinedOptimizer(parts)

    whole, half = network(), network()
    train(whole, [make(whole)], 6)
    first = make(half)
    train(half, [first], 3)
    second = make(half)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.children[0].state is second.state
    assert second.param_groups[1] is second.children[1].param_groups[0]
    train(half, [second], 3, start=3)
    assert same(whole, half)


def test_parameters_are_found_by_name_when_the_groups_are_cut_differently():
    net = network()
    names = dict(net.named_parameters())
    one = CombinedOptimizer([torch.optim.AdamW(list(names.items()), lr=0.1)])
    train(net, [one], 2)
    backwards = [torch.optim.AdamW([(name, param)], lr=0.1) for name, param in reversed(names.items())]
    other = CombinedOptimizer(backwards)
    other.load_state_dict(through_a_file(one.state_dict()))
    for param in names.values():
        assert torch.equal(one.state[param]["exp_avg"], other.state[param]["exp_avg"])


def test_hyperparameters_come_from_the_state_as_torch_does_it():
    net = network()
    saved = CombinedOptimizer(children(net)).state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    optimizer = CombinedOptimizer(children(net))
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.children[0].param_groups] == [0.5]


def test_a_state_of_other_optimizers_is_refused():
    net = network()
    state = CombinedOptimizer([torch.optim.AdamW(list(net.named_parameters()))]).state_dict()
    with pytest.raises(CheckpointError, match=r"'0.weight'.*AdamW.*MuonOptimizer"):
        CombinedOptimizer(children(net)).load_state_dict(state)


def test_a_state_of_another_model_is_refused():
    other = nn.Sequential(nn.Linear(4, 3))
    state = CombinedOptimizer([torch.optim.AdamW(list(other.named_parameters()))]).state_dict()
    with pytest.raises(CheckpointError, match=r"2\.weight"):
        CombinedOptimizer(children(network())).load_state_dict(state)
    nameless = CombinedOptimizer([torch.optim.AdamW(other.parameters())]).state_dict()
    with pytest.raises(CheckpointError, match=r"\[2\].*\[2, 2\]"):
        CombinedOptimizer(children(network())).load_state_dict(nameless)


def test_a_parameter_cannot_have_two_optimizers():
    net = network()
    with pytest.raises(ConfigurationError, match="two"):
        CombinedOptimizer([torch.optim.SGD(net.parameters(), lr=1), torch.optim.AdamW(net.parameters())])


def test_no_optimizer_is_refused():
    with pytest.raises(ConfigurationError, match="at least one"):
        CombinedOptimizer([])


def test_a_group_that_comes_later_is_refused_rather_than_left_untrained():
    optimizer = CombinedOptimizer(children(network()))
    late = nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigurationError, match=r"which of .*MuonOptimizer.*AdamW.* should train it"):
        optimizer.add_param_group({"params": [late]})
    assert all(late is not param for group in optimizer.param_groups for param in group["params"])
