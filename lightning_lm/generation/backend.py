"""What reinforcement learning asks of whatever writes the answers: this package, or an inference server."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from lightning_lm.generation.generator import Completion
from lightning_lm.generation.sampling import Sampling

__all__ = ["GenerationBackend"]


@runtime_checkable
class GenerationBackend(Protocol):
    """Answers prompts: `lightning_lm.generation.Generator`, `lightning_lm.generation.HTTPGenerator`, or another."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling = ...,
        max_new_tokens: int = ...,
        stop_ids: Iterable[int] = ...,
        stop_strings: Sequence[str] = ...,
        num_samples: int = ...,
        logprobs: bool = ...,
    ) -> list[Completion]:
        """Return ``num_samples`` answers to each prompt: first those to the first prompt, then those to the second."""
        ...
