"""Questions that an evaluation asks of a model, and the answers it gets: likelihoods of texts, and completions."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lightning_lm.evals.reasoning import ChainOfThought
from lightning_lm.generation import Sampling

__all__ = [
    "Completions",
    "EvaluatedModel",
    "Generation",
    "Likelihood",
    "LogLikelihood",
    "Prompt",
    "Request",
    "RollingLikelihood",
    "Shot",
]


@dataclasses.dataclass(frozen=True)
class Shot:
    """An example with its answer that stands before the question.

    Args:
        question: The question, as the item's own is written.
        answer: The right answer, with the white space that parts it from the question.
    """

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question, the examples before it and the instructions before these.

    Examples are kept apart from the question, so that a prompt that is longer than the context loses whole examples,
    the first ones first, and a chat template can make turns of them.

    Args:
        question: Text that is to be continued.
        shots: Examples with answers.
        instructions: Text before the examples; the system message of a chat.
        separator: Text between examples, and before the question.
        begun: Beginning of the model's own text, which it continues.
    """

    question: str
    shots: tuple[Shot, ...] = ()
    instructions: str = ""
    separator: str = "\n\n"
    begun: str = ""

    @property
    def text(self) -> str:
        """The prompt as plain text."""
        shots = "".join(shot.question + shot.answer + self.separator for shot in self.shots)
        return self.instructions + shots + self.question + self.begun

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as turns of a chat: instructions, questions and answers, and the question."""
        turns = [("system", self.instructions.strip())] if self.instructions.strip() else []
        for shot in self.shots:
            turns += [("user", shot.question), ("assistant", shot.answer.strip())]
        return [{"role": role, "content": content} for role, content in [*turns, ("user", self.question)]]

    def without_first(self, count: int) -> "Prompt":
        """Return the prompt without its first examples.

        Args:
            count: Examples to leave out.
        """
        return dataclasses.replace(self, shots=self.shots[count:])


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Asks for the log-likelihood of a continuation.

    Args:
        prompt: Text before it. Its trailing white space belongs to the continuation when they become tokens.
        continuation: Text to score, with the white space that parts it from the prompt.
        group: Requests of one group, such as the choices of an item, keep the same examples where not all fit into the
            context; by default those of one prompt. `evaluate_tasks` makes a group of each item.
    """

    prompt: Prompt
    continuation: str
    group: str = dataclasses.field(default="", repr=False)


@dataclasses.dataclass(frozen=True)
class RollingLikelihood:
    """Asks for the log-likelihood of a whole text, each token once, in windows of the model's context.

    Args:
        text: Text to score.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class Generation:
    """Asks for completions.

    Args:
        prompt: Text to continue.
        stop: Texts that end a completion; they are not part of it.
        max_new_tokens: Most tokens of a completion.
        num_samples: Completions of the prompt.
        sampling: Sampling settings.
        reasoning: Reasoning before the answer, written in phases by `evaluate_tasks`.
        key: Number that, with the seed, decides the random draws; `evaluate_tasks` takes one from the name of the item.
    """

    prompt: Prompt
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    num_samples: int = 1
    sampling: Sampling = Sampling(temperature=0)
    reasoning: ChainOfThought | None = None
    key: int = dataclasses.field(default=0, repr=False)


Request = Likelihood | RollingLikelihood | Generation


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """Score of a text.

    Args:
        logprob: Sum over its tokens. Nats.
        num_tokens: Tokens that were scored.
        is_greedy: True if each of them was the likeliest.
        dropped_shots: Examples that did not fit into the context.
        is_truncated: True if even without examples the text did not fit, and its left was cut.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool = False
    dropped_shots: int = 0
    is_truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Completions:
    """Completions of one prompt.

    Args:
        texts: Each completion, without what ended it.
        num_tokens: Generated tokens of each.
        dropped_shots: Examples that did not fit into the context.
        is_truncated: True if even without examples the prompt did not fit, and its left was cut.
    """

    texts: tuple[str, ...]
    num_tokens: tuple[int, ...]
    dropped_shots: int = 0
    is_truncated: bool = False


@runtime_checkable
class EvaluatedModel(Protocol):
    """A model under evaluation: one in this process, or behind a server."""

    @property
    def description(self) -> dict[str, str]:
        """Identity for the results: checkpoint and its digest, tokenizer, address."""
        ...

    def log_likelihoods(self, requests: Sequence[Likelihood | RollingLikelihood]) -> list[LogLikelihood]:
        """Return the score of each request, in their order."""
        ...

    def generate(self, requests: Sequence[Generation]) -> list[Completions]:
        """Return the completions of each request, in their order."""
        ...
