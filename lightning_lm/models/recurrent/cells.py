"""LSTM, GRU and plain recurrent layers as mixers, computed by torch's own kernels.

The kernels read a row from its first token to its last and cannot start again inside it, so the documents of packed
rows are laid out as a batch of their own, by similar length, and every one starts from zeros. Each gate is a matrix
of a stack ``[gates, hidden, in]``: Muon orthogonalises matrices, and four gates under each other are not one.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_lm.models.context import Context
from lightning_lm.models.init import residual_output
from lightning_lm.models.norms import Norm
from lightning_lm.models.recurrent.mixer import Memory, RecurrentMixer, RecurrentPart, RecurrentState, run
from lightning_lm.parts import Limit

__all__ = ["CellMixer", "Recurrent"]

_KERNELS: dict[str, Any] = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh}
_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
_FORGET = 1
"""Place of the forget gate among torch's gates of an LSTM: input, forget, cell, output."""


@dataclass(frozen=True, kw_only=True)
class Recurrent(RecurrentPart, limits={"hidden_size": Limit.COUNT, "forget_bias": Limit.FINITE}):
    """A recurrent layer: LSTM, GRU, or the plain network of Elman.

    Args:
        cell: Kind of the cell.
        hidden_size: Features of the state; ``None`` for ``d_model``.
        forget_bias: Added to the forget gate of an LSTM, so that it remembers before it has learned to.

    Source:
        Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000; its bias: Jozefowicz et al. 2015. GRU: Cho et al.
        2014, arXiv:1406.1078, in the variant of cuDNN. Language models: Mikolov et al. 2010; Zaremba et al. 2014,
        arXiv:1409.2329.
    """

    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    hidden_size: int | None = None
    forget_bias: float = 1.0

    def build(self, d_model: int, *, norm: Norm) -> "CellMixer":  # noqa: ARG002
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return CellMixer(self, d_model)


class CellMixer(RecurrentMixer):
    """A recurrent layer, and a linear layer from its state to the residual stream.

    Args:
        part: The description.
        d_model: Features of the residual stream.
    """

    parallel_plan: ClassVar[dict[str, str]] = {}

    def __init__(self, part: Recurrent, d_model: int) -> None:
        super().__init__()
        self.part, self.hidden_size = part, part.hidden_size or d_model
        gates = _GATES[part.cell]
        self.input_weight = nn.Parameter(torch.zeros(gates, self.hidden_size, d_model))
        self.state_weight = nn.Parameter(torch.zeros(gates, self.hidden_size, self.hidden_size))
        self.bias = nn.Parameter(torch.zeros(gates * self.hidden_size))
        self.o = residual_output(nn.Linear(self.hidden_size, d_model, bias=False))

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        context: Context | None = None,
        state: RecurrentState | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Mix each token with those before it.

        Args:
            x: Hidden states of the new tokens.
            context: Documents and cache of the tokens; by default rows of one document each.
            state: Memory of earlier tokens; the new ones are added.
        """
        if state is None and context is not None and context.documents is not None:
            return cast(Tensor, self.o(self._read_documents(x, context.documents.ids)))
        return run(self.mix, x, context, state)

    def mix(
        self,
        x: Float[Tensor, "batch seq d_model"],
        document_ids: Int[Tensor, "batch seq"] | None,
        memory: Memory | None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], Memory]:
        """Return the outputs of some tokens, and the memory after them.

        Args:
            x: Hidden states.
            document_ids: Documents of the tokens; ``None`` if each row is one.
            memory: State of the cells, [batch, hidden] each.
        """
        if document_ids is None:
            states, memory = self._read(x, memory)
            return cast(Tensor, self.o(states)), memory
        document, place, lengths = _layout(document_ids)
        first, last = document[:, 0], document[:, -1]
        if memory is not None:  # of the first document in each row
            memory = tuple(v.new_zeros(len(lengths), v.size(1)).index_copy(0, first, v) for v in memory)
        padded = x.new_zeros(len(lengths), int(lengths.max()), x.size(2))
        padded[document, place] = x
        packed = pack_padded_sequence(padded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, memory = self._read_packed(packed, memory)
        return cast(Tensor, self.o(states[document, place])), tuple(values[last] for values in memory)

    def _read_documents(self, x: Tensor, document_ids: Tensor) -> Tensor:
        """Return the states of packed rows, whose documents are padded into batches of similar length."""
        document, place, lengths = _layout(document_ids)
        states = x.new_empty(*x.shape[:2], self.hidden_size, dtype=self.bias.dtype)
        group = lengths.float().log2().long()  # documents of a group are at most twice as long as each other
        for size in group.unique():
            members = group == size
            renumbered = members.cumsum(0) - 1
            here = members[document]
            rows, columns = renumbered[document[here]], place[here]
            padded = x.new_zeros(int(members.sum()), int(lengths[members].max()), x.size(2))
            read, _ = self._read(padded.index_put((rows, columns), x[here]), None)
            states = states.index_put(tuple(here.nonzero().T), read[rows, columns])
        return states

    def _read(self, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Return the states of rows that are one document each, and the last ones."""
        x, kernel = x.to(self.bias.dtype), _KERNELS[self.part.cell]
        states, *last = kernel(x, self._begin(x, memory), self._weights(), True, 1, 0.0, self.training, False, True)
        return states, tuple(values[0] for values in last)

    def _read_packed(self, packed: PackedSequence, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Return the padded states of sequences of different lengths, and the last ones of each."""
        kernel, order = _KERNELS[self.part.cell], packed.sorted_indices
        assert order is not None
        data = packed.data.to(self.bias.dtype)
        memory = None if memory is None else tuple(values[order] for values in memory)
        begin = self._begin(data.new_empty(len(order), 0), memory)
        states, *last = kernel(data, packed.batch_sizes, begin, self._weights(), True, 1, 0.0, self.training, False)
        padded, _ = pad_packed_sequence(packed._replace(data=states), batch_first=True)
        return padded, tuple(values[0][packed.unsorted_indices] for values in last)

    def _begin(self, x: Tensor, memory: Memory | None) -> Any:
        """Return the state before the first token as the kernels take it."""
        if memory is None:
            memory = (x.new_zeros(len(x), self.hidden_size),) * (2 if self.part.cell == "lstm" else 1)
        begin = tuple(values[None] for values in memory)
        return begin if self.part.cell == "lstm" else begin[0]

    def _weights(self) -> list[Tensor]:
        second = torch.zeros_like(self.bias)
        if self.part.cell == "lstm":
            second[_FORGET * self.hidden_size : (_FORGET + 1) * self.hidden_size] = self.part.forget_bias
        return [self.input_weight.flatten(0, 1), self.state_weight.flatten(0, 1), self.bias, second]


def _layout(document_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's document, counted over all rows, its place in it, and the documents' lengths."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    document = (begins.flatten().cumsum(0) - 1).view_as(document_ids)
    lengths = torch.bincount(document.flatten())
    first = lengths.cumsum(0) - lengths
    place = torch.arange(document.numel(), device=document.device).view_as(document) - first[document]
    return document, place, lengths
