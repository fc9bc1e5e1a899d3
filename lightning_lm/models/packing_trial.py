"""A trial of whether a model keeps the documents of packed rows apart.

A causal model gives the first document of a row what it gives it in a row of its own. So two short documents are packed
in both orders: each must get the same output in second place as in first. Both orders are rows of one batch, which
makes the comparison exact up to rounding on any device and in any dtype, and costs one forward pass.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["ONE_PER_ROW", "keeps_documents_apart", "several_documents"]

ONE_PER_ROW = (
    "Give each document a row of its own: --data.packing OnePerRow for text, --data.rows.packing OnePerRow for chats "
    "and examples; in Python packing=OnePerRow()."
)
"""The remedy for a model that mixes documents."""

_LENGTHS = (5, 8)
"""Tokens of the two documents."""
_TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
_TOLERANCE = 1e-4
"""Largest distance of a token's output, relative to its size; rounding stays far below it, leaks far above."""


@torch.no_grad()
def keeps_documents_apart(
    model: nn.Module,
    run: Callable[[dict[str, Tensor]], Float[Tensor, "batch seq width"]],
    *,
    num_ids: int,
    device: torch.device,
) -> bool:
    """Return whether a document gets the same output after another one as at the beginning of a row.

    The model runs in evaluation mode without autocast; its mode and the random state are as before afterwards.
    Collective for sharded weights: call on all ranks.

    Args:
        model: Any causal model.
        run: Calls it with ``input_ids``, ``position_ids`` and ``document_ids``, and returns hidden states or logits.
        num_ids: Ids that the model has.
        device: Device of its inputs.
    """
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(num_ids, (length,), generator=generator) for length in _LENGTHS]
    orders = (documents, documents[::-1])
    inputs = {
        "input_ids": torch.stack([torch.cat(order) for order in orders]),
        "position_ids": torch.stack([torch.cat([torch.arange(len(part)) for part in order]) for order in orders]),
        "document_ids": torch.stack(
            [torch.arange(2).repeat_interleave(torch.tensor(n)) for n in (_LENGTHS, _LENGTHS[::-1])]
        ),
    }
    with _evaluation(model), torch.autocast(device.type, enabled=False):
        output = run({name: value.to(device) for name, value in inputs.items()})
    short, long = _LENGTHS
    apart = torch.cat([output[0, :short], output[1, :long]]).float()
    packed = torch.cat([output[1, long:], output[0, short:]]).float()
    distance = (packed - apart).norm(dim=-1) / apart.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return bool(distance.max() <= _TOLERANCES.get(output.dtype, _TOLERANCE))


def several_documents(input_ids: Int[Tensor, "batch seq"], document_ids: Int[Tensor, "batch seq"]) -> bool:
    """Return whether any row has more than one document. Padding, which is a document of token 0, does not count.

    Args:
        input_ids: Tokens.
        document_ids: Equal within a document.
    """
    return bool(((document_ids != document_ids[:, :1]) & (input_ids != 0)).any())


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, and compile nothing for it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    compiles = "torch._dynamo" in sys.modules  # slow to import, and not needed for a model that is not compiled
    try:
        with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
            yield
    finally:
        for module in training:
            module.training = True
