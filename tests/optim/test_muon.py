"""Muon against singular value decompositions in float64 and torch's own Muon."""

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.optim import MuonOptimizer, orthogonalize

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024
SHAPES = [(6, 6), (5, 9), (9, 5), (4, 40), (40, 4), (1, 7), (7, 1), (3, 4, 20), (2, 3, 9, 4)]


def by_svd(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The quintic applied to every singular value by itself."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum(dim=-1, keepdim=True).sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag_embed(values) @ right


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Five iterations amplify rounding by up to 3.4445**5, twice that in Gram space.
    [(torch.float64, 1e-10), (torch.float32, 2e-4)],
    ids=["float64", "float32"],
)
def test_applies_the_quintic_to_singular_values(shape, dtype, tolerance):
    matrix = random(*shape, dtype=dtype)
    result = orthogonalize(matrix, dtype=dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), by_svd(matrix), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_singular_values_come_near_one(dtype):
    values = torch.linalg.svdvals(orthogonalize(random(64, 256), dtype=dtype).double())
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_the_precision_follows_the_machine(monkeypatch):
    """Both ways to compute agree as far as eight bits go."""
    results = []
    for fast in (True, False):
        monkeypatch.setattr("lightning_lm.optim.muon._cpu_has_bfloat16", lambda fast=fast: fast)
        results.append(orthogonalize(random(16, 48, dtype=torch.float32)))
    exact = by_svd(random(16, 48, dtype=torch.float32))
    errors = [((result.double() - exact).norm() / exact.norm()).item() for result in results]
    assert errors[1] < 1e-4 < errors[0] < 2e-2
    assert [result.dtype for result in results] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("shape", [(6, 6), (4, 40)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_size_of_the_gradient_does_not_matter(shape, size):
    matrix = random(*shape, dtype=torch.float32)
    result = orthogonalize(matrix * size, dtype=torch.float32)
    torch.testing.assert_close(result, orthogonalize(matrix, dtype=torch.float32), rtol=1e-3, atol=1e-3)


def test_a_matrix_of_zeros_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(3, 4, 9)), torch.zeros(3, 4, 9))


def test_nearly_singular_matrices_in_float32():
    left, right = (torch.linalg.qr(random(size, 16))[0] for size in (16, 64))
    matrix = left @ torch.diag(torch.logspace(0, -6, 16, dtype=torch.float64)) @ right.T
    result = orthogonalize(matrix.float(), dtype=torch.float32)
    torch.testing.assert_close(result.double(), by_svd(matrix), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scaling", ["original", "match_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_follows_torch(scaling, nesterov):
    shapes = [(16, 48), (48, 16), (16, 16), (16, 48)]
    start = [random(*shape, dtype=torch.float32) * (index + 1) for index, shape in enumerate(shapes)]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    optimizers = (
        MuonOptimizer(ours, scaling=scaling, **settings),
        torch.optim.Muon(
            theirs, adjust_lr_fn={"original": "original", "match_adamw": "match_rms_adamw"}[scaling], **settings
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, initial in zip(ours, theirs, start, strict=True):
        moved = (other - initial).norm()
        # torch iterates in bfloat16 (8 bits).
        assert (mine - other).norm() < 0.02 * moved


def test_matching_adamw_gives_updates_of_its_size():
    param = torch.zeros(64, 256, requires_grad=True)
    param.grad = random(64, 256, dtype=torch.float32)
    MuonOptimizer([param], lr=1.0, scaling="match_adamw").step()
    # AdamW's updates have a root mean square of 0.2 to 0.4 (Liu et al. 2025, section 2.2).
    assert param.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("scaling", ["original", "match_adamw"])
def test_parameters_worked_on_together_move_as_alone(monkeypatch, scaling):
    """On a GPU equal shapes and their transposes share one stack; on a CPU each matrix is worked on alone."""
    shapes = [(4, 6), (6, 4), (4, 4), (2, 6, 4), (3, 3, 4, 6), (4, 6)]

    def run() -> list[torch.Tensor]:
        params = [random(*shape).requires_grad_() for shape in shapes]
        optimizer = MuonOptimizer(params, weight_decay=0.1, scaling=scaling)
        for step in range(1, 3):
            for param in params:
                param.grad = param.detach().flip(-1) * step
            optimizer.step()
        return params

    alone = run()
    monkeypatch.setattr(
        "lightning_lm.optim.muon._batches",
        lambda params: [[params[index] for index in (0, 1, 3, 4, 5)], [params[2]]],
    )
    for mine, other in zip(run(), alone, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_a_stack_is_orthogonalised_matrix_by_matrix():
    grad = random(3, 5, 12)
    stack = torch.zeros(3, 5, 12, dtype=torch.float64, requires_grad=True)
    single = [torch.zeros(5, 12, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    stack.grad = grad.clone()
    for param, part in zip(single, grad, strict=True):
        param.grad = part.clone()
    MuonOptimizer([stack]).step()
    MuonOptimizer(single).step()
    torch.testing.assert_close(stack.detach(), torch.stack([param.detach() for param in single]))


def test_weight_decay_is_decoupled_and_missing_gradients_are_passed_over():
    still, moving = (torch.ones(4, 4, requires_grad=True) for _ in range(2))
    moving.grad = torch.zeros(4, 4)
    MuonOptimizer([still, moving], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still.detach(), torch.ones(4, 4))
    torch.testing.assert_close(moving.detach(), torch.full((4, 4), 0.95))


def test_evaluates_the_closure_with_gradients():
    param = random(4, 4).requires_grad_()

    def closure() -> torch.Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    before = param.detach().square().sum()
    assert MuonOptimizer([param]).step(closure) == before
    assert param.detach().square().sum() < before


def test_goes_on_from_a_state_dict():
    def run(steps: int, param: torch.Tensor, optimizer: MuonOptimizer) -> None:
        for _ in range(steps):
            param.grad = param.detach() ** 3 + 0.1
            optimizer.step()

    whole, half = (random(6, 8).requires_grad_() for _ in range(2))
    run(6, whole, MuonOptimizer([whole]))
    first = MuonOptimizer([half])
    run(3, half, first)
    second = MuonOptimizer([half])
    second.load_state_dict(first.state_dict())
    run(3, half, second)
    assert torch.equal(whole, half)


def test_vectors_are_refused():
    with pytest.raises(ConfigurationError, match=r"\(3,\).*AdamW"):
        MuonOptimizer([torch.zeros(3, requires_grad=True)])
