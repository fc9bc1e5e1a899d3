"""Hidden states of padded rows without reading the padding, nor twice what rows begin with alike.

Rows of preferences, of completions and of rewards are ragged and padded on the right, and many begin with the same
prompt. A model gets them in the tightest form that it computes exactly:

* the layers of `Transformer` on a CPU: all tokens in a single row, a common prefix once, its keys and values seen by
  all rows that begin with it;
* any model that keeps packed documents apart: rows packed into fewer rows that are no longer than the longest;
* any other model: the padded rows.
"""

import bisect
import inspect
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_lm.functional.attention import Documents, SharedPrefixes
from lightning_lm.models.attention import SelfAttention
from lightning_lm.models.ffn import FeedForward, GatedFeedForward
from lightning_lm.models.huggingface.transformers_model import TransformersModel, is_of_transformers, unsupported
from lightning_lm.models.own_model import hidden_or_whole_logits, mixed_documents, with_counted
from lightning_lm.models.transformer import Block, Transformer

__all__ = ["outputs_at"]

Ints = NDArray[np.int64]

SHORTEST_PREFIX = 4
"""Tokens below which a common prefix is read again: seeing its keys takes as long."""
WORTH = 0.95
"""Fraction of the positions of the padded rows above which packing them saves too little."""
_MIXES: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
"""Ways in which models that were tried mix the documents of packed rows; ``None`` for those that do not."""

_SAID: set[tuple[str, str]] = set()
"""Warnings that were given, by class of the model and reason."""


def outputs_at(
    model: nn.Module, inputs: Mapping[str, Tensor], wanted: Bool[Tensor, "rows seq"]
) -> Float[Tensor, "... width"]:
    """Return the hidden states at some positions, row after row; logits if the model shows no hidden states.

    They and their gradients are those of reading the rows as they are, up to the order of sums. The choice of the form
    depends on the model alone, and each takes one forward pass, so that ranks of sharded models stay together.

    Args:
        model: Causal language model.
        inputs: ``input_ids``, padded on the right, and what else the model may take.
        wanted: Mask of the positions; whatever stands after the last one of a row is padding.
    """
    inputs = with_counted(model, inputs, wanted)
    if _are_whole_rows(inputs):
        if _can_share(model, wanted.device):
            return _read_shared(model, inputs["input_ids"], wanted)
        if _mixes_documents(model, inputs["input_ids"]) is None:
            return _read_packed(model, inputs, wanted)
    return hidden_or_whole_logits(model, inputs)[wanted]


def _are_whole_rows(inputs: Mapping[str, Tensor]) -> bool:
    """Return whether each row is one document that begins in its first column."""
    positions = inputs.get("position_ids")
    columns = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    packed = "document_ids" in inputs or "prefix_lengths" in inputs
    return not packed and (positions is None or bool((positions == columns).all()))


# --- a single row, in which rows continue the prefix of another ---


def _can_share(model: nn.Module, device: torch.device) -> bool:
    """Return whether a token's hidden state depends on earlier tokens only, in layers that see `SharedPrefixes`."""
    return (
        device.type == "cpu"
        and isinstance(model, Transformer)
        and type(model).hidden is Transformer.hidden
        and not _is_compiled(model)
        and not (model.training and _drops(model))
        and all(
            inspect.unwrap(type(block).forward) is inspect.unwrap(Block.forward)
            and "forward" not in vars(block)
            and _is_plain_attention(block.mixer)
            and isinstance(block.ffn, FeedForward | GatedFeedForward | None)
            for block in model.layers
        )
    )


def _is_plain_attention(mixer: object) -> bool:
    if not isinstance(mixer, SelfAttention) or not mixer.is_causal:
        return False
    return type(mixer).forward is SelfAttention.forward and not {"forward", "attend"} & vars(mixer).keys()


def _is_compiled(model: nn.Module) -> bool:
    """Return whether parts are compiled: they would be compiled anew for each batch."""
    return any(part._compiled_call_impl is not None for part in model.modules())


def _drops(model: Transformer) -> bool:
    dropouts = [part.p for part in model.modules() if isinstance(part, nn.Dropout)]
    dropouts += [part.part.dropout for part in model.modules() if isinstance(part, SelfAttention)]
    return any([model.config.dropout, *dropouts])


def _read_shared(model: Any, input_ids: Tensor, wanted: Tensor) -> Tensor:
    mask = wanted.numpy()
    lengths = _lengths(mask)
    if not lengths.any():
        return hidden_or_whole_logits(model, {"input_ids": input_ids})[wanted]
    ids = input_ids.numpy()
    leaders, shared = _common_prefixes(np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, -1))
    own = lengths - shared
    order = np.lexsort((own, shared))
    order = order[own[order] > 0]
    sizes, before = own[order], shared[order]
    starts = np.zeros_like(lengths)
    starts[order] = np.cumsum(sizes) - sizes
    begins = np.flatnonzero(np.append(True, (np.diff(sizes) != 0) | (np.diff(before) != 0)))
    counts = np.diff(np.append(begins, len(order)))
    prefixes = SharedPrefixes(
        lengths=tuple(before[begins].tolist()),
        tokens=torch.from_numpy(np.repeat(starts[leaders[order]], before) + _count_up(before)),
    )
    documents = Documents(
        ids=torch.from_numpy(np.repeat(np.arange(len(order)), sizes))[None],
        runs=tuple(zip(counts.tolist(), sizes[begins].tolist(), strict=True)),
        prefixes=prefixes if len(prefixes.tokens) else None,
    )
    columns = np.repeat(before, sizes) + _count_up(sizes)
    text = torch.from_numpy(ids[np.repeat(order, sizes), columns])[None]
    hidden = model.hidden(text, position_ids=torch.from_numpy(columns)[None], document_ids=documents)
    rows, places = np.nonzero(mask)
    is_own = places >= shared[rows]
    found = np.where(is_own, starts[rows] + places - shared[rows], starts[leaders[rows]] + places)
    return torch.index_select(hidden[0], 0, torch.from_numpy(found))


def _common_prefixes(text: Ints) -> tuple[Ints, Ints]:
    """Return the row whose prefix each row continues, and the tokens of that prefix; 0 for rows that are read whole.

    In sorted order rows that begin alike are neighbours. They are cut into groups whose first row is read whole and
    whose others continue it, such that the fewest tokens are read.

    Args:
        text: Ids of each row, -1 after its end.
    """
    rows, width = text.shape
    order = np.argsort((text + 1).astype(">u4").view(f"V{4 * width}").ravel(), kind="stable")
    ordered = text[order]
    alike = ((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).cumprod(1).sum(1)
    alike[alike < SHORTEST_PREFIX] = 0
    saved, first_of = np.zeros(rows + 1, dtype=np.int64), np.arange(-1, rows)
    for first in range(rows):
        if saved[first + 1] < saved[first]:
            saved[first + 1], first_of[first + 1] = saved[first], first
        stop = np.flatnonzero(alike[first:] == 0)
        common = np.minimum.accumulate(alike[first : first + stop[0] if len(stop) else None])
        total = saved[first] + np.cumsum(common)
        ends = np.flatnonzero(total > saved[first + 2 : first + 2 + len(total)]) + first + 2
        saved[ends], first_of[ends] = total[ends - first - 2], first
    leaders, shared = np.empty(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    end = rows
    while end:
        first = int(first_of[end])
        leaders[order[first:end]] = order[first]
        shared[order[first + 1 : end]] = np.minimum.accumulate(alike[first : end - 1])
        end = first
    return leaders, shared


# --- packed rows ---


def _mixes_documents(model: nn.Module, input_ids: Tensor) -> str | None:
    """Return how a model mixes the documents of packed rows, ``None`` if it keeps them apart; tried and said once."""
    if model not in _MIXES:
        how = _MIXES[model] = _tried(model, input_ids)
        kind = type(model).__name__
        if how is not None and (kind, how) not in _SAID:
            _SAID.add((kind, how))
            warnings.warn(f"{kind} {how}. Its rows are padded to the longest one instead of packed.", stacklevel=4)
    return _MIXES[model]


def _tried(model: nn.Module, input_ids: Tensor) -> str | None:
    if _is_compiled(model):
        return "is compiled, which packed rows of changing shapes would repeat for each batch"
    if isinstance(model, TransformersModel):
        apart = model.keeps_documents_apart(input_ids.device)
        return None if apart else "lets each document of a packed row see the one before it"
    if is_of_transformers(model):
        return f"cannot be told of packed documents: it {unsupported(model)}"
    if any("attend" in vars(part) for part in model.modules()):
        return "has layers whose attention is replaced, as if each row were shared by several ranks"
    if isinstance(model, Transformer) and all(_is_plain_attention(block.mixer) for block in model.layers):
        return None
    return mixed_documents(model, {"input_ids": input_ids})


def _read_packed(model: nn.Module, inputs: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    mask = wanted.cpu().numpy()
    lengths = _lengths(mask)
    row_of, first_column, ranks = _bins(lengths)
    shape = int(row_of.max()) + 1, int(lengths.max())
    if not 0 < shape[0] * shape[1] <= WORTH * mask.size:
        return hidden_or_whole_logits(model, inputs)[wanted]
    source = np.repeat(np.arange(len(lengths)), lengths), _count_up(lengths)
    target = row_of[source[0]], first_column[source[0]] + source[1]
    filled, documents = np.bincount(target[0])[:, None], np.bincount(row_of[lengths > 0])[:, None]
    packed = {"document_ids": np.tile(documents, shape[1]), "position_ids": np.arange(shape[1]) - filled}
    packed["document_ids"][target], packed["position_ids"][target] = ranks[source[0]], source[1]
    ids = inputs["input_ids"]
    given = {name: torch.from_numpy(values).to(ids.device) for name, values in packed.items()}
    given["input_ids"] = ids.new_zeros(shape)
    given["input_ids"][target] = ids[source]
    if "counted" in inputs:
        given["counted"] = torch.zeros(shape, dtype=torch.bool, device=ids.device)
        given["counted"][target] = True
    rows, columns = np.nonzero(mask)
    return hidden_or_whole_logits(model, given)[row_of[rows], first_column[rows] + columns]


def _bins(lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the packed row, the first column and the index in its row of each document: the longest first, best fit.

    Args:
        lengths: Tokens of the documents, some of which may have none.
    """
    width, gaps = int(lengths.max()), list[tuple[int, int]]()
    rows, columns, ranks = np.zeros_like(lengths), np.zeros_like(lengths), np.zeros_like(lengths)
    documents: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if not length:
            break
        place = bisect.bisect_left(gaps, (length, -1))
        gap, row = gaps.pop(place) if place < len(gaps) else (width, len(documents))
        documents += [0] if row == len(documents) else []
        rows[index], columns[index], ranks[index] = row, width - gap, documents[row]
        documents[row] += 1
        bisect.insort(gaps, (gap - length, row))
    return rows, columns, ranks


def _lengths(wanted: NDArray[np.bool_]) -> Ints:
    """Return the columns up to the last wanted one of each row."""
    return np.where(wanted.any(1), wanted.shape[1] - wanted[:, ::-1].argmax(1), 0)


def _count_up(counts: Ints) -> Ints:
    """Return 0, 1, ... for each count: [2, 3] gives [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
