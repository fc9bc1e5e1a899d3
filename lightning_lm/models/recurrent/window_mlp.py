"""The neural network language model of Bengio et al.: a hidden layer over the embeddings of the last few tokens.

The first neural language model: ``tanh(d + H x)``, where ``x`` are the embeddings of the ``n - 1`` tokens before the
predicted one, one after the other. Unlike an n-gram table it generalises to neighbours of what it has seen, and unlike
a recurrent network it forgets all that lies further back. Simplified: the output goes through the residual stream, so
the direct connection from the embeddings to the logits (``W`` in the paper) is there for the last token alone.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.init import residual_output
from lightning_lm.models.norms import Norm
from lightning_lm.models.recurrent.mixer import Memory, RecurrentMixer, RecurrentPart
from lightning_lm.parts import Limit

__all__ = ["WindowMLP", "WindowMLPMixer"]


@dataclass(frozen=True, kw_only=True)
class WindowMLP(RecurrentPart, limits={"order": Limit.COUNT, "hidden_size": Limit.COUNT}):
    """A hidden layer over the last ``order - 1`` tokens of the document.

    Args:
        order: Tokens of an n-gram, the predicted one included, as in `fit_ngram`.
        hidden_size: Features of the hidden layer; ``None`` for ``4 d_model``.

    Source:
        Bengio et al. 2003, "A Neural Probabilistic Language Model", equation 1.
    """

    order: int = 5
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order < 2:
            raise ConfigurationError(f"order={self.order} leaves no token to predict from; use at least 2.")

    def build(self, d_model: int, *, norm: Norm) -> "WindowMLPMixer":  # noqa: ARG002
        """Return a module with ``forward(x, context, state)`` and ``make_state(max_length)``."""
        return WindowMLPMixer(self, d_model)


class WindowMLPMixer(RecurrentMixer):
    """A hidden layer over the last tokens, and a linear layer to the residual stream.

    Args:
        part: The description.
        d_model: Features of the residual stream.
    """

    parallel_plan: ClassVar[dict[str, str]] = {"steps.*": "colwise", "o": "rowwise"}

    def __init__(self, part: WindowMLP, d_model: int) -> None:
        super().__init__()
        self.part = part
        hidden_size = part.hidden_size or 4 * d_model
        self.steps = nn.ModuleList(nn.Linear(d_model, hidden_size, bias=back == 0) for back in range(part.order - 1))
        self.o = residual_output(nn.Linear(hidden_size, d_model, bias=False))

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
            memory: The last ``order - 2`` hidden states, zeros before the document.
        """
        kept, seq = self.part.order - 2, x.size(1)
        (before,) = memory or (x.new_zeros(len(x), kept, x.size(2)),)
        seen = torch.cat((before, x), 1)
        ids = None if document_ids is None else torch.cat((document_ids[:, :1].expand(-1, kept), document_ids), 1)
        total = self.steps[0](x)
        for back, step in enumerate(list(self.steps)[1:], 1):
            earlier = slice(kept - back, kept - back + seq)
            inputs = seen[:, earlier]
            if ids is not None:
                inputs = inputs * (ids[:, earlier] == ids[:, kept:])[..., None]
            total = total + step(inputs)
        after = seen[:, seq:]
        if ids is not None:
            after = after * (ids[:, seq:] == ids[:, -1:])[..., None]
        return cast(Tensor, self.o(torch.tanh(total))), (after,)
