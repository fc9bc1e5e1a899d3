"""Generators of completions for reinforcement learning: this package, ``transformers``, or an inference server."""

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation.generator import Completion, Generator
from lightning_lm.generation.openai_client import HTTPGenerator
from lightning_lm.generation.sampling import Sampling
from lightning_lm.generation.transformers import TransformersGenerator
from lightning_lm.generation.weight_push import WeightPush
from lightning_lm.json_http import JSONServer
from lightning_lm.parts import Part
from lightning_lm.protocols import Tokenizer

__all__ = ["Backend", "GenerationBackend", "HTTPBackend", "OwnBackend", "PolicyAtWork", "TransformersBackend"]


class PolicyAtWork(NamedTuple):
    """Prompts to complete, and the limits of their completions."""

    model: Any
    tokenizer: Tokenizer | None
    rows_at_once: int | None
    """Most rows that are decoded together."""
    steps_agree: Callable[[bool], bool] | None
    """See `lightning_lm.generation.Generator`; ``None`` for a single process."""


@runtime_checkable
class GenerationBackend(Protocol):
    """Source of completions: `lightning_lm.generation.Generator`, `HTTPGenerator`, or another."""

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
        """Return ``num_samples`` completions of each prompt: first those of the first, then those of the second."""
        ...


@dataclass(frozen=True, kw_only=True)
class Backend(Part, abc.ABC):
    """Base of the backends that YAML can name; ``RolloutPlan(backend=...)`` chooses one."""

    has_own_weights: ClassVar[bool] = False
    """True if it has weights of its own, which may not be those in training."""

    @property
    def push(self) -> WeightPush | None:
        """Transfer of the weights in training; ``None`` if it needs none, or never gets them."""
        return None

    @abc.abstractmethod
    def build(self, policy: PolicyAtWork) -> GenerationBackend:
        """Return the backend at work.

        Args:
            policy: Whose completions are wanted.
        """


@dataclass(frozen=True, kw_only=True)
class OwnBackend(Backend):
    """`lightning_lm.generation.Generator`: any model, with the weights in training."""

    def build(self, policy: PolicyAtWork) -> GenerationBackend:
        """Return the generator."""
        return Generator(policy.model, policy.tokenizer, batch_size=policy.rows_at_once, steps_agree=policy.steps_agree)


@dataclass(frozen=True, kw_only=True)
class TransformersBackend(Backend):
    """The ``generate`` of a policy that is a ``transformers`` model, with the weights in training."""

    def build(self, policy: PolicyAtWork) -> GenerationBackend:
        """Return the generator."""
        return TransformersGenerator(
            policy.model,
            policy.tokenizer,
            batch_size=policy.rows_at_once,
            ranks_agree=policy.steps_agree is not None,
        )


@dataclass(frozen=True, kw_only=True)
class HTTPBackend(Backend):
    """An inference server with OpenAI's interface, such as vLLM or SGLang: see `lightning_lm.generation.HTTPGenerator`.

    With a ``push`` the server gets the policy's weights before each rollout. Without, it keeps those that it was
    started with, and `RolloutPlan` insists on an ``importance_cap``, which corrects for some of the difference.

    Args:
        server: Address of its API, such as ``{url: http://localhost:8000/v1}``.
        model: Name of the model on the server.
        weights: Transfer of the policy's weights to the server; ``None`` for never.
        max_requests: Most requests that are under way at the same time, from each rank.
        logprobs_at_temperature: True if the server's log-probabilities are those at the sampling temperature.
    """

    has_own_weights: ClassVar[bool] = True
    server: JSONServer
    model: str
    weights: WeightPush | None = None
    max_requests: int = 64
    logprobs_at_temperature: bool = False

    def __post_init__(self) -> None:
        if self.max_requests < 1:
            raise ConfigurationError(f"max_requests={self.max_requests} lets no request through; give at least 1.")

    @property
    def push(self) -> WeightPush | None:
        """Transfer of the weights in training to the server."""
        return self.weights

    def build(self, policy: PolicyAtWork) -> GenerationBackend:
        """Return the client; the server has the model, and batches as it likes."""
        return HTTPGenerator(
            self.server,
            self.model,
            policy.tokenizer,
            max_requests=self.max_requests,
            logprobs_at_temperature=self.logprobs_at_temperature,
        )
