"""Causal convolutions of each feature by itself: short ones with learned taps, and ones as long as the text by FFT.

Both stop at the boundaries of packed documents. The short one, before the linear recurrences of `linear_recurrence`,
lets a token see its nearest neighbours; the long one is the mixer of Hyena.
"""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_lm.functional.linear_recurrence import number_documents

__all__ = ["long_convolution", "short_convolution"]


def short_convolution(
    x: Float[Tensor, "batch seq channels"],
    weight: Float[Tensor, "channels width"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    document_ids: Int[Tensor, "batch seq"] | None = None,
    tail: Float[Tensor, "batch before channels"] | None = None,
) -> tuple[Float[Tensor, "batch seq channels"], Float[Tensor, "batch before channels"]]:
    """Return the sum of each token's newest inputs, ``y_t = sum_i weight[:, i] x_{t - width + 1 + i}``, and the tail.

    A sum of shifted products: as fast on a CPU as torch's grouped convolution, and documents cost one mask per tap.

    Args:
        x: Inputs.
        weight: Taps of each channel, the last for the token itself.
        bias: Added to the sum.
        document_ids: Equal inside a document, whose first tokens see zeros before them. ``None`` if each row is one.
        tail: The ``width - 1`` inputs before the first token, of its document; ``None`` for zeros.

    Returns:
        The sums, and the last ``width - 1`` inputs: zeros for those that are not of the last token's document.
    """
    before = weight.size(1) - 1
    if tail is None:
        tail = x.new_zeros((x.size(0), before, x.size(2)))
    inputs = torch.cat((tail.to(x.dtype), x), 1)
    numbers = None
    if document_ids is not None:
        numbers = F.pad(number_documents(document_ids), (before, 0))
    length = x.size(1)
    total = x * weight[:, -1]
    for lag in range(1, before + 1):
        earlier = inputs[:, before - lag : before - lag + length]
        if numbers is not None:
            same = numbers[:, before - lag : before - lag + length] == numbers[:, before:]
            earlier = earlier * same[..., None]
        total = total + earlier * weight[:, before - lag]
    rest = inputs[:, length:]
    if numbers is not None:
        rest = rest * (numbers[:, length:] == numbers[:, -1:])[..., None]
    return total if bias is None else total + bias, rest


def long_convolution(
    x: Float[Tensor, "batch seq channels"],
    filters: Float[Tensor, "taps channels"],
    *,
    document_ids: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq channels"]:
    """Return ``y_t = sum_i filters[i] x_{t - i}`` by FFT, in time ``seq log(seq)``, in float32 or better.

    Packed documents are convolved as rows of their own, padded to the longest.

    Args:
        x: Inputs.
        filters: Weight of each lag, from the token itself on; at least as many as a document has tokens.
        document_ids: Equal inside a document. ``None`` if each row is one.

    Source:
        Poli et al. 2023, arXiv:2302.10866, section 3.3.
    """
    if document_ids is None:
        return _convolve(x, filters)
    numbers = number_documents(document_ids)
    first_of_row = F.pad(numbers[:, -1].cumsum(0)[:-1] + torch.arange(1, len(x), device=x.device), (1, 0))
    documents = (numbers + first_of_row[:, None]).flatten()
    lengths = torch.bincount(documents)
    places = torch.arange(len(documents), device=x.device) - (lengths.cumsum(0) - lengths)[documents]
    rows = x.new_zeros((len(lengths), int(lengths.max()), x.size(2)))
    rows = rows.index_put((documents, places), x.flatten(0, 1))
    return _convolve(rows, filters)[documents, places].view_as(x)


def _convolve(x: Tensor, filters: Tensor) -> Tensor:
    length, dtype = x.size(1), torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        spectrum = torch.fft.rfft(x.to(dtype), n=2 * length, dim=1)
        response = torch.fft.rfft(filters[:length].to(dtype), n=2 * length, dim=0)
        return cast(Tensor, torch.fft.irfft(spectrum * response, n=2 * length, dim=1)[:, :length].to(x.dtype))
