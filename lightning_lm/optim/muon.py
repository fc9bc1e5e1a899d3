"""Muon: momentum whose update is orthogonalised, for the matrices of a network."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.dtypes import accumulation_dtype
from lightning_lm.optim.combined import require_complete

__all__ = ["MuonOptimizer", "MuonScaling", "orthogonalize"]

MuonScaling = Literal["original", "match_adamw"]
"""Scaling of the step with the shape: ``max(1, rows / columns) ** 0.5``, or ``0.2 * max(rows, columns) ** 0.5``."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class SymmetricProduct(Protocol):
    """``alpha x x' + beta added`` of stacks of matrices, where both terms are symmetric."""

    def __call__(self, x: Tensor, added: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
        """Return the sum."""


def orthogonalize(
    matrices: Tensor,
    *,
    steps: int = 5,
    dtype: torch.dtype | None = None,
    symmetric_product: SymmetricProduct | None = None,
) -> Tensor:
    """Bring all singular values of matrices near one (0.7 to 1.2) and keep their singular vectors.

    Args:
        matrices: One or more matrices, [..., rows, columns].
        steps: Newton-Schulz iterations.
        dtype: Type of the products and of the result. Default: bfloat16 on GPUs and on CPUs with instructions for it,
            else float32.
        symmetric_product: Computes half of each symmetric product and mirrors it. Default: torch computes all of it.

    Source:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (the quintic).
    """
    dtype = dtype or _product_dtype(matrices)
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = (matrices.mT if tall else matrices).to(dtype)
    # In float64 the squares of tiny and of huge gradients stay in range.
    size = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True, dtype=accumulation_dtype(wide.device))
    wide = wide / torch.where(size > 0, size, 1).to(dtype)
    # In half precision the Gram matrix loses the small singular values.
    if symmetric_product is not None:
        stack = _iterate_symmetric(wide.reshape(-1, *wide.shape[-2:]), steps, symmetric_product).reshape(wide.shape)
        return stack.mT if tall else stack
    through_gram = wide.shape[-1] >= 2 * wide.shape[-2] and dtype in (torch.float32, torch.float64)
    wide = (_iterate_gram if through_gram else _iterate)(wide, steps)
    return wide.mT if tall else wide


def _product_dtype(matrices: Tensor) -> torch.dtype:
    if matrices.dtype == torch.float64:
        return torch.float64
    fast = matrices.device.type == "cuda" or (matrices.device.type == "cpu" and _cpu_has_bfloat16())
    return torch.bfloat16 if fast else torch.float32


@functools.cache
def _cpu_has_bfloat16() -> bool:
    """Return True if bfloat16 matmuls are faster than float32: four times with AMX, slower without instructions."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _iterate(matrices: Tensor, steps: int) -> Tensor:
    """X <- a X + (b A + c A A) X with A = X X'."""
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = matrices @ matrices.mT
        polynomial = _add_product(gram, gram, gram, beta=b, alpha=c)
        matrices = _add_product(matrices, polynomial, matrices, beta=a, alpha=1.0)
    return matrices


def _iterate_symmetric(matrices: Tensor, steps: int, product: SymmetricProduct) -> Tensor:
    """Do the same; of the three products of a step two are symmetric."""
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = product(matrices)
        polynomial = product(gram, gram, alpha=c, beta=b)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=a, alpha=1.0)
    return matrices


def _symmetric_product_for(matrices: Tensor) -> SymmetricProduct | None:
    """Return the kernel where it is faster than torch: on GPUs, for large matrices."""
    if matrices.device.type != "cuda":
        return None
    from lightning_lm.kernels.newton_schulz import LEAST_ROWS, symmetric_product

    return symmetric_product if min(matrices.shape[-2:]) >= LEAST_ROWS else None


def _iterate_gram(matrices: Tensor, steps: int) -> Tensor:
    """Do the same in the space of the Gram matrix, which is small for wide matrices.

    Every iterate is a polynomial in the first Gram matrix times the first X; these polynomials commute and are
    symmetric, so the wide matrix is needed only at the start and at the end.
    """
    a, b, c = _COEFFICIENTS
    gram = matrices @ matrices.mT
    product: Tensor | None = None
    for step in range(steps):
        polynomial = _add_product(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    return matrices if product is None else product @ matrices


def _add_product(added: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Return ``beta * added + alpha * left @ right``, of matrices or of stacks of them."""
    if left.dim() == 2:
        return torch.addmm(added, left, right, beta=beta, alpha=alpha)
    shape = left.shape[:-2]
    flat = [tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (added, left, right)]
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).reshape(*shape, *added.shape[-2:])


class MuonOptimizer(Optimizer):
    """SGD with momentum whose update is made orthogonal, with decoupled weight decay.

    Parameters of equal shape are orthogonalised together. Of a matrix that is shared among ranks (DTensor) each gathers
    the whole update, in one collective, and applies its part. Parameters with more than two dimensions are stacks of
    matrices (one per expert). Vectors, embeddings and output heads belong to AdamW.

    Args:
        params: Parameters or groups; each at least two-dimensional.
        lr: Learning rate before scaling by the shape. Unitless.
        momentum: Momentum coefficient. Unitless.
        nesterov: Look ahead by one step of the momentum.
        weight_decay: Decoupled weight decay, multiplied by the learning rate at each step. Unitless.
        steps: Newton-Schulz iterations.
        scaling: "original" (Jordan), or "match_adamw": an update as large as AdamW's, so that its learning rate and
            weight decay carry over.

    Raises:
        ConfigurationError: If a parameter has fewer than two dimensions.

    Source:
        Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982, equation 4 (match_adamw).
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        steps: int = 5,
        scaling: MuonScaling = "original",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "steps": steps,
            "scaling": scaling,
        }
        super().__init__(params, defaults)
        shapes = [tuple(param.shape) for group in self.param_groups for param in group["params"]]
        flat = [shape for shape in shapes if len(shape) < 2]
        if flat:
            raise ConfigurationError(f"Muon orthogonalises matrices and got shape {flat[0]}; give it to AdamW.")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state; that of `torch.optim.Muon`, which is the same momentum, is taken over too.

        Args:
            state_dict: State of this class, or of `torch.optim.Muon` with the default coefficients.

        Raises:
            CheckpointError: If another kind of optimizer wrote it.
        """
        groups = [_from_torch(group) for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        require_complete(self)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        for together in _batches(params):
            grads = [param.grad for param in together if param.grad is not None]
            momenta = [self.state[param]["momentum_buffer"] for param in together]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
            if group["weight_decay"]:
                torch._foreach_mul_(together, 1 - group["lr"] * group["weight_decay"])
            whole = [update.full_tensor() if isinstance(update, DTensor) else update for update in updates]
            for param, delta in zip(together, _orthogonal(whole, group["steps"]), strict=True):
                param.add_(_laid_out_like(param, delta), alpha=-group["lr"] * _shape_factor(param, group["scaling"]))


def _from_torch(group: dict[str, Any]) -> dict[str, Any]:
    """Translate the settings of a group of `torch.optim.Muon`; return any other group as it is."""
    scalings = {None: "original", "original": "original", "match_rms_adamw": "match_adamw"}
    if tuple(group.get("ns_coefficients", ())) != _COEFFICIENTS or group.get("adjust_lr_fn", "") not in scalings:
        return group
    kept = {name: value for name, value in group.items() if name not in ("ns_coefficients", "eps")}
    return {**kept, "steps": kept.pop("ns_steps"), "scaling": scalings[kept.pop("adjust_lr_fn")]}


def _laid_out_like(param: Tensor, whole: Tensor) -> Tensor:
    """Return the part of a whole tensor that belongs to this rank, where the parameter is shared among ranks."""
    if not isinstance(param, DTensor):
        return whole
    mesh = param.device_mesh
    everywhere = DTensor.from_local(whole.to(param.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=param.placements)


def _batches(params: list[Tensor]) -> Iterable[list[Tensor]]:
    """Cut parameters into lists that are worked on together: one by one in a CPU's cache, else by shape."""
    by_shape: dict[Any, list[Tensor]] = defaultdict(list)
    for index, param in enumerate(params):
        key = index if param.device.type == "cpu" else (param.device, param.dtype, *sorted(param.shape[-2:]))
        by_shape[key].append(param)
    return by_shape.values()


def _orthogonal(updates: Sequence[Tensor], steps: int) -> Iterable[Tensor]:
    """Orthogonalise matrices of one shape, or its transpose, together."""
    if len(updates) == 1:
        product = _symmetric_product_for(updates[0])
        return [orthogonalize(updates[0], steps=steps, symmetric_product=product)]
    wide = [update.mT if update.shape[-2] > update.shape[-1] else update for update in updates]
    stack = torch.cat([update.reshape(-1, *update.shape[-2:]) for update in wide])
    together = orthogonalize(stack, steps=steps, symmetric_product=_symmetric_product_for(stack))
    parts = torch.split(together, [update[..., 0, 0].numel() for update in wide])
    return [
        (part.mT if update.shape[-2] > update.shape[-1] else part).reshape(update.shape)
        for part, update in zip(parts, updates, strict=True)
    ]


def _shape_factor(param: Tensor, scaling: MuonScaling) -> float:
    rows, columns = param.shape[-2:]
    if scaling == "match_adamw":
        return float(0.2 * max(rows, columns) ** 0.5)
    return float(max(1.0, rows / columns) ** 0.5)
