"""A request to the engine, and the updates that it delivers while the completion grows."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from lightning_lm.errors import LightningLMError
from lightning_lm.generation import FinishReason, Sampling
from lightning_lm.generation.decoding_loop import StopConditions

__all__ = [
    "TIMED_OUT",
    "DoesNotFit",
    "EngineStopped",
    "GenerationFailed",
    "GenerationRequest",
    "OutOfMemory",
    "QueueFull",
    "TimedOut",
    "TokenLogprob",
    "Update",
    "failing",
]

_log = logging.getLogger(__name__)

TIMED_OUT = "The request took longer than its time limit. Ask for fewer tokens, or try again."


class QueueFull(LightningLMError, RuntimeError):  # noqa: N818
    """More requests wait than the queue takes."""


class TimedOut(LightningLMError, RuntimeError):  # noqa: N818
    """A request took longer than its time limit."""


class DoesNotFit(LightningLMError, ValueError):  # noqa: N818
    """A request is larger than the engine could ever take."""


class GenerationFailed(LightningLMError, RuntimeError):  # noqa: N818
    """The model, or the tokenizer, failed at a request."""


class OutOfMemory(GenerationFailed):
    """The memory did not suffice for a request."""


class EngineStopped(LightningLMError, RuntimeError):  # noqa: N818
    """The engine has ended, and no request can be finished."""


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token under the model at temperature 1, before penalties, bias and truncation.

    Args:
        token_id: The token.
        logprob: Its log-probability. Nats.
        top: The likeliest tokens in falling order, with their log-probabilities. Nats.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Update:
    """Progress of a completion; the last one has a ``finish_reason`` or an ``error``.

    Args:
        text: New text that no later token can change.
        token_ids: New tokens; the one that ended the completion is among them.
        logprobs: One for each new token, if they were asked for.
        prompt_logprobs: One for each token of the prompt, ``None`` for the first, if they were asked for; in the first
            update only.
        finish_reason: Reason of the end.
        error: Reason why there is no completion.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    error: LightningLMError | None = None

    @property
    def is_last(self) -> bool:
        """True if nothing follows."""
        return self.finish_reason is not None or self.error is not None


@dataclasses.dataclass(kw_only=True, eq=False)
class GenerationRequest:
    """One completion to make.

    Args:
        prompt_ids: Token ids of the prompt, at least one.
        deliver: Called in the engine's thread with each `Update`; must return at once.
        ends: Stop conditions; with ``max_new_tokens=0`` the prompt is only scored.
        sampling: Sampling settings; with a seed unless they are greedy.
        sample: Index among the completions of this prompt; with the seed it decides the random numbers.
        stop_strings: Texts that end the completion.
        logit_bias: Numbers that are added to the logits of tokens.
        top_logprobs: Number of likeliest tokens that are reported beside each token, with their log-probabilities;
            ``None`` reports no log-probabilities.
        prompt_logprobs: Report those of the prompt too.
        deadline_s: ``time.monotonic()`` after which the request is given up. Seconds.
    """

    prompt_ids: tuple[int, ...]
    deliver: Callable[[Update], None]
    ends: StopConditions
    sampling: Sampling = Sampling(temperature=0)
    sample: int = 0
    stop_strings: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    deadline_s: float | None = None
    is_cancelled: bool = False
    """True once nobody waits for the completion."""
    is_done: bool = False
    """True once the last update was delivered."""

    def fail(self, error: LightningLMError) -> None:
        """Deliver an error as the last update, unless the request has ended.

        Args:
            error: Reason why there is no completion.
        """
        if not (self.is_done or self.is_cancelled):
            self.is_done = True
            with contextlib.suppress(Exception):  # the client's function; there is nobody else to tell
                self.deliver(Update(error=error))


@contextlib.contextmanager
def failing(requests: Iterable[GenerationRequest]) -> Iterator[None]:
    """Let what a computation raises fail its requests, and not the engine, which goes on with the others.

    An accelerator that has failed computes nothing any more: such an error is raised.

    Args:
        requests: Those that are computed; looked through after a failure only.
    """
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001 - models, tokenizers and delivery are foreign code, which raises anything
        failure = _failure(error)
        if failure is not error:
            _log.error("%s", failure, exc_info=error)
        for request in requests:
            request.fail(failure)


def _failure(error: Exception) -> LightningLMError:
    """Return what a client is told of an exception."""
    if isinstance(error, LightningLMError):
        return error
    said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return OutOfMemory(
            f"The memory does not suffice ({said}). Ask for fewer tokens, or start the server with a smaller "
            "--max-batch or --cache-memory."
        )
    return GenerationFailed(f"The model failed at this request: {said}. See the server's output.")
