"""Interfaces between the parts of the package. Anything that has these attributes fits; nothing has to inherit.

Batches have no class of their own. Callbacks count tokens, and measure perplexity, of these forms:

* a mapping with ``input_ids`` [batch, seq], and ``labels`` [batch, seq] if not every token is a target (unshifted, -100
  where there is no target);
* a pair ``(inputs, targets)`` of integer tensors [batch, seq], the targets shifted by one already.

Beside any other batch they show nothing that is counted in tokens.
"""

from __future__ import annotations  # importing the readers of data must not import torch

from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["GradientHolder", "HasParallelPlan", "LanguageModel", "RewardFunction", "Tokenizer", "is_language_model"]


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model: token ids in, next-token logits out.

    ``hidden`` and ``head`` exist for losses that never build all logits:
    ``forward(ids) == soft-cap(head(hidden(ids)))``.
    """

    head: nn.Linear
    """Weight [vocab, d_model]; shared with the embedding where these are tied."""

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        cache: Any | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return next-token logits."""
        ...

    def hidden(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        document_ids: Int[Tensor, "batch seq"] | None = None,
        cache: Any | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the normalised hidden states that ``head`` turns into logits."""
        ...


def is_language_model(model: object) -> TypeGuard[Any]:
    """Return True if a model has `hidden` and `head`, so that losses need not build all logits.

    `isinstance` does not tell on Python 3.12 and newer, where it overlooks the submodules of a module.

    Args:
        model: Any model.
    """
    return hasattr(model, "hidden") and hasattr(model, "head")


@runtime_checkable
class HasParallelPlan(Protocol):
    """A module that declares the parallel role of the modules below it, for tensor parallelism.

    The names and their meaning are in `lightning_lm.strategies.tensor_parallel.plan`. Numbers that the ranks must
    divide can be named in ``parallel_divides``.
    """

    parallel_plan: Mapping[str, str]
    """Names of modules below this one, globs allowed, and their roles."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens and their ids."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Id that separates documents and ends a completion, if there is one."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides which ids a text gets."""
        ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of a text. Special tokens written in it are ordinary text unless allowed."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text as an unsigned integer array."""
        ...

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """Yield the ids of texts that follow each other, in bounded memory."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_byte_lengths(self) -> np.ndarray:
        """Return int64 [vocab_size]: UTF-8 bytes of text that each id stands for, 0 for special tokens."""
        ...

    def save(self, path: Path | str) -> None:
        """Write everything needed to load it again into a folder."""
        ...

    def to_files(self) -> dict[str, str]:
        """Return the content of every file that `save` writes, by name; checkpoints carry it."""
        ...


@runtime_checkable
class RewardFunction(Protocol):
    """Scores completions: one number per sample, ``None`` if it does not apply. May be async."""

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None] | Awaitable[Sequence[float | None]]:
        """Return the reward of each sample; ``columns`` are ``completion_ids`` and the other columns of the data."""
        ...


@runtime_checkable
class GradientHolder(Protocol):
    """A strategy under which a rank may have only some averaged gradients, or shards of them.

    It computes norms and clips over the gradients of all ranks.
    """

    def held_gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the averaged gradients, or shards of them, from which this rank updates parameters."""
        ...

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Return the 2-norm of all gradients together, a plain tensor. Collective: call on all ranks."""
        ...
