"""A sharded optimizer does what the wrapped one does: arguments, return values, groups of ranks, uneven inputs."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.optim import CombinedOptimizer, MuonOptimizer
from lightning_lm.strategies import ShardedOptimizer

STEPS, SPLIT = 5, 500


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 30))


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def train(model, optimizer, steps=STEPS):
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def plain():
    model = layers()
    return train(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def assert_equal(found, wanted):
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)


class Picky(torch.optim.SGD):
    """Takes more than a closure, returns more than a loss, and has a ``zero_grad`` of its own."""

    zeroed = 0

    def step(self, closure=None, *, scale=1.0):
        for group in self.param_groups:
            group["lr"] *= scale
        loss = super().step(closure)
        return {"loss": loss, "scale": scale}

    def zero_grad(self, set_to_none=True):
        self.zeroed += 1
        super().zero_grad(set_to_none)


def arguments_and_results():
    model = layers()
    optimizer = ShardedOptimizer(Picky(model.parameters(), lr=0.1), min_split_elements=SPLIT)

    def closure():
        assert torch.is_grad_enabled()
        set_gradients(model, 0)
        return torch.tensor(3.0)

    results = [optimizer.step(closure, scale=0.5), optimizer.step(scale=2.0), optimizer.step()]
    optimizer.zero_grad()
    gone = all(param.grad is None for param in model.parameters())
    set_gradients(model, 0)
    optimizer.zero_grad(set_to_none=False)
    zero = all(not param.grad.any() for param in model.parameters())
    return results, optimizer.inner.zeroed, gone, zero, [param.detach() for param in model.parameters()]


def test_arguments_results_and_overridden_methods(ranks):
    model = layers()
    set_gradients(model, 0)
    wanted = [param.detach() - 0.1 * (0.5 + 1 + 1) * param.grad for param in model.parameters()]
    for results, zeroed, gone, zero, weights in ranks(2).run(arguments_and_results):
        assert results == [{"loss": 3.0, "scale": 0.5}, {"loss": None, "scale": 2.0}, {"loss": None, "scale": 1.0}]
        assert (zeroed, gone, zero) == (2, True, True)
        assert_equal(weights, wanted)


def test_a_child_with_its_own_zero_grad_is_asked_too():
    model = layers()
    child = Picky(model.parameters(), lr=0.1)
    CombinedOptimizer([child]).zero_grad()
    assert child.zeroed == 1


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        return super().step(closure)


def twice():
    model = layers()
    set_gradients(model, 0)
    optimizer = ShardedOptimizer(Twice(model.parameters(), lr=0.1))
    with pytest.raises(ConfigurationError, match="more than once"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(ConfigurationError, match="LBFGS cannot be sharded over 2 ranks"):
        ShardedOptimizer(torch.optim.LBFGS(model.parameters()))
    return [len(group["params"]) for group in optimizer.param_groups]


def test_a_closure_that_is_evaluated_twice_is_refused_on_several_ranks(ranks):
    assert ranks(2).run(twice) == [[4], [4]]


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, ShardedOptimizer])
def test_one_process_may_evaluate_a_closure_as_often_as_it_likes(wrap):
    """Minimising a quadratic form: the line search of L-BFGS finds the solution of the linear system."""
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, target = root @ root.T + torch.eye(6), torch.randn(6, dtype=torch.float64)
    param = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def optimizer():
        return wrap(torch.optim.LBFGS([param], max_iter=10, line_search_fn="strong_wolfe"))

    def closure():
        first.zero_grad(), second.zero_grad()
        loss = 0.5 * param @ matrix @ param - target @ param
        loss.backward()
        return loss

    first = second = optimizer()
    first.step(closure)
    second = optimizer()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.step(closure)
    torch.testing.assert_close(param.detach(), torch.linalg.solve(matrix, target), rtol=0, atol=1e-5)  # its own limit


class Recorded(torch.optim.SGD):
    def step(self, closure=None):
        events.append("step")
        return super().step(closure)


events: list[object] = []


def order():
    model = layers()
    optimizer = ShardedOptimizer(Recorded(model.parameters(), lr=0.1), min_split_elements=SPLIT)
    events.clear()

    def closure():
        events.append(sum(len(group["params"]) for group in optimizer.inner.param_groups))
        set_gradients(model, 0)

    optimizer.step(closure)
    return events, [param.detach() for param in model.parameters()]


def test_a_closure_is_evaluated_in_the_step_and_sees_all_parameters(ranks):
    """As torch's optimizers do; what is counted or timed around a step then includes the passes."""
    model = layers()
    set_gradients(model, 0)
    wanted = [param.detach() - 0.1 * param.grad for param in model.parameters()]
    for events, weights in ranks(2).run(order):
        assert events == ["step", 4]
        assert_equal(weights, wanted)


# --- groups of ranks ---


def in_a_group():
    """Ranks 1 and 2 share the state, rank 0 has all of its own."""
    groups = [distributed.new_group(members) for members in ([0], [1, 2])]
    group = groups[min(1, distributed.get_rank())]
    model = layers()
    settings = {"lr": 0.1, "min_split_elements": SPLIT, "process_group": group}
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, **settings)
    weights = train(model, optimizer)
    held = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
    return weights, held, optimizer.full_state_dict()


def test_state_is_sharded_over_a_group(ranks):
    wanted, model = plain(), layers()
    alone = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, alone)
    total = 2 * sum(param.numel() for param in model.parameters())
    found = ranks(3).run(in_a_group)
    for weights, _, _ in found:
        assert_equal(weights, wanted)
    (_, everything, _), (_, first, state), (_, second, nothing) = found
    assert (everything, first + second) == (total, total)
    assert max(first, second) < 0.55 * total
    assert nothing is None  # the first rank of a group has its whole state
    for index, entry in alone.state_dict()["state"].items():
        assert_equal(list(state["state"][index].values()), list(entry.values()))


# --- ranks with fewer batches ---


class Gradients(Joinable):
    """Gives each rank the averaged gradient of a step, also one that has no batches left: as a wrapper would."""

    def __init__(self, model):
        super().__init__()
        self.model, self.step = model, 0

    def set(self):
        Join.notify_join_context(self)
        set_gradients(self.model, self.step)
        self.step += 1

    def join_hook(self, **settings):
        return _Set(self)

    join_device = torch.device("cpu")

    @property
    def join_process_group(self):
        return distributed.group.WORLD


class _Set(JoinHook):
    def __init__(self, gradients):
        self.gradients = gradients

    def main_hook(self):
        set_gradients(self.gradients.model, self.gradients.step)
        self.gradients.step += 1


def uneven(cls):
    model = layers()
    gradients = Gradients(model)
    if cls is ShardedOptimizer:
        optimizer = cls(model.parameters(), torch.optim.AdamW, lr=0.1, min_split_elements=SPLIT)
    else:
        optimizer = cls(model.parameters(), torch.optim.AdamW, lr=0.1)
    with Join([gradients, optimizer]):
        for _ in range(STEPS if distributed.get_rank() else 2):
            gradients.set()
            optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("cls", [ZeroRedundancyOptimizer, ShardedOptimizer])
def test_a_rank_without_batches_keeps_up(ranks, cls):
    wanted = plain()
    for found in ranks(2).run(uneven, cls):
        assert_equal(found, wanted)


# --- states of other optimizers ---


def state_of(optimizer):
    set_gradients_of(optimizer)
    optimizer.step()
    return optimizer.state_dict()


def set_gradients_of(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.eye(*param.shape) + 0.1 * torch.arange(param.numel()).view_as(param).cos()


def matrices():
    return [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), nn.Parameter(torch.linspace(1, 2, 12).view(4, 3))]


OTHERS = {
    "SGD into AdamW": (torch.optim.SGD, torch.optim.AdamW, "betas, eps"),
    "AdamW into SGD": (torch.optim.AdamW, torch.optim.SGD, "momentum, dampening"),
    "SGD into Muon": (torch.optim.SGD, MuonOptimizer, "steps, scaling"),
    "AdamW into Muon": (torch.optim.AdamW, MuonOptimizer, "momentum, nesterov, steps, scaling"),
}


@pytest.mark.parametrize(("saved", "loads", "missing"), OTHERS.values(), ids=OTHERS)
def test_the_state_of_another_optimizer_is_refused(saved, loads, missing):
    state = state_of(saved(matrices(), lr=0.1))
    for optimizer in (ShardedOptimizer(loads(matrices(), lr=0.1)), CombinedOptimizer([loads(matrices(), lr=0.1)])):
        with pytest.raises(CheckpointError, match=rf"not written by {loads.__name__}: its groups lack {missing}"):
            optimizer.load_state_dict(state)


def test_a_state_of_an_earlier_torch_is_completed_by_torch():
    state = state_of(torch.optim.AdamW(matrices(), lr=0.1))
    for group in state["param_groups"]:
        for name in ("fused", "foreach", "maximize"):
            del group[name]
    ShardedOptimizer(torch.optim.AdamW(matrices(), lr=0.1)).load_state_dict(state)


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, ShardedOptimizer])
def test_the_momentum_of_torch_is_taken_over(scaling, wrap):
    """Another step with torch's own Muon is the oracle; both iterate in half precision."""
    params = matrices()
    theirs = torch.optim.Muon(params, lr=0.1, momentum=0.8, weight_decay=0.0, adjust_lr_fn=scaling)
    ours_params = matrices()
    ours = wrap(MuonOptimizer(ours_params, lr=0.3))
    ours.load_state_dict(state_of(theirs))
    with torch.no_grad():
        for param, other in zip(ours_params, params, strict=True):
            param.copy_(other)
    for optimizer in (theirs, ours):
        set_gradients_of(optimizer)
        optimizer.step()
    for param, other in zip(ours_params, params, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=5e-3)
    momentum = [state["momentum_buffer"] for state in ours.state.values()]
    assert_equal(momentum, [state["momentum_buffer"] for state in theirs.state.values()])


def test_other_coefficients_of_torch_are_refused():
    state = state_of(torch.optim.Muon(matrices(), lr=0.1, ns_coefficients=(2.0, -1.5, 0.5)))
    with pytest.raises(CheckpointError, match="lack steps, scaling"):
        MuonOptimizer(matrices()).load_state_dict(state)
