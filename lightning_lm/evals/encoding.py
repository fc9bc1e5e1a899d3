"""Token ids of what an evaluation asks: the border between prompt and continuation, and what fits into the context.

The rules are those of lm-evaluation-harness, so that scores agree: trailing white space of a prompt belongs to the
continuation, prompt and continuation are encoded as one text and cut at the length of the encoded prompt, a begin mark
stands in front once, and a long text is scored in windows in which each token is a target once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals.requests import Likelihood, Prompt, RollingLikelihood
from lightning_lm.generation.generator import any_mark, begin_mark
from lightning_lm.protocols import Tokenizer

__all__ = ["Encoder", "ScoredText", "windows"]


class ScoredText(NamedTuple):
    """A row of token ids whose last ones are to be scored.

    Args:
        ids: Context and targets.
        num_targets: Ids at the end that are scored; at least one id stands before them.
        dropped_shots: Examples that did not fit.
        is_truncated: True if the left of the text was cut.
    """

    ids: NDArray[np.uint32]
    num_targets: int
    dropped_shots: int = 0
    is_truncated: bool = False


class Encoder:
    """Encodes prompts for one tokenizer and one context length.

    Args:
        tokenizer: Tokenizer of the model.
        max_length: Tokens that the model reads at most; ``None`` without a limit.
        chat: Write prompts by the tokenizer's chat template.

    Raises:
        ConfigurationError: If a chat template is asked for and there is none, or a number is too small.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int | None = None, chat: bool = False) -> None:
        if max_length is not None and max_length < 2:
            raise ConfigurationError(f"max_length={max_length} leaves no context; give at least 2.")
        if chat and getattr(tokenizer, "chat_template", None) is None:
            raise ConfigurationError(
                f"{type(tokenizer).__name__} has no chat template, which chat=True needs. Evaluate without it, or name "
                "a tokenizer that has one."
            )
        self.tokenizer, self.max_length, self.chat = tokenizer, max_length, chat
        self.templated = chat
        """True if texts are the output of a chat template, with its special tokens and its own begin mark."""
        self._mark = begin_mark(tokenizer)
        self._texts: dict[str, list[int]] = {}

    def text(self, prompt: Prompt) -> str:
        """Return a prompt as the model gets it, without the begin mark.

        Args:
            prompt: The prompt.
        """
        if not self.chat:
            return prompt.text
        apply: Any = self.tokenizer.apply_chat_template  # type: ignore[attr-defined]
        return str(apply(prompt.messages, add_generation_prompt=True)) + prompt.begun.lstrip()

    def rows(self, requests: Sequence[Likelihood | RollingLikelihood]) -> list[list[ScoredText]]:
        """Return the rows to score for each request: one, or the windows of a text longer than the context.

        Continuations of one group, or of one prompt, are scored behind the same examples: as many are left out as the
        longest of them needs.

        Args:
            requests: Continuations, and whole texts.

        Raises:
            DataError: If a continuation is empty.
        """
        found: list[list[ScoredText]] = [[] for _ in requests]
        groups: dict[str | Prompt, list[int]] = {}
        for place, request in enumerate(requests):
            if isinstance(request, RollingLikelihood):
                found[place] = self.rolling(request)
            else:
                groups.setdefault(request.group or request.prompt, []).append(place)
        for places in groups.values():
            group = [request for place in places if isinstance(request := requests[place], Likelihood)]
            for place, rows in zip(places, self._together(group), strict=True):
                found[place] = rows
            self._texts.clear()
        return found

    def likelihood(self, request: Likelihood) -> list[ScoredText]:
        """Return the rows to score for a single continuation.

        Args:
            request: Prompt and continuation.

        Raises:
            DataError: If the continuation is empty.
        """
        (rows,) = self.rows([request])
        return rows

    def rolling(self, request: RollingLikelihood) -> list[ScoredText]:
        """Return the windows of a whole text, each token a target once.

        Args:
            request: The text.
        """
        tokens = self._encode(request.text)
        mark = (self._mark or any_mark(self.tokenizer))[-1:]
        return list(windows([*mark, *tokens], len(tokens) - (not mark), self.max_length))

    def prompt(self, prompt: Prompt, max_new_tokens: int) -> ScoredText:
        """Return the ids of a prompt with room for a completion behind it.

        Args:
            prompt: The prompt.
            max_new_tokens: Most tokens of the completion.

        Raises:
            ConfigurationError: If the completion alone fills the context.
        """
        if self.max_length is not None and max_new_tokens >= self.max_length:
            raise ConfigurationError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the context of {self.max_length} "
                "tokens. Set fewer for the task, or evaluate a model with a longer context."
            )
        context, _, dropped = self._fitting(prompt, max_new_tokens, lambda text: (self._context(text), []))
        self._texts.clear()
        room = len(context) if self.max_length is None else self.max_length + 1 - max_new_tokens
        ids = np.asarray(context[-room:], dtype=np.uint32)
        return ScoredText(ids, 0, dropped, len(context) > room)

    def _together(self, requests: Sequence[Likelihood]) -> list[list[ScoredText]]:
        """Return the rows of continuations that are compared with each other."""
        found: list[tuple[list[int], list[int], int]] = []
        most = 0
        for request in requests:
            if not request.continuation:
                raise DataError(f"A continuation of {request.prompt.question[:80]!r} is empty and cannot be scored.")
            found.append(self._fitting_continuation(request, most))
            most = found[-1][2]
        scored = []
        for request, (context, targets, dropped) in zip(requests, found, strict=True):
            if dropped < most:
                context, targets, dropped = self._fitting_continuation(request, most)
            cut = self.max_length is not None and len(context) + len(targets) - 1 > self.max_length
            rows = windows([*context, *targets], len(targets), self.max_length)
            scored.append([row._replace(dropped_shots=dropped, is_truncated=cut) for row in rows])
        return scored

    def _fitting_continuation(self, request: Likelihood, dropped: int) -> tuple[list[int], list[int], int]:
        return self._fitting(request.prompt, 0, lambda text: self._border(text, request.continuation), dropped)

    def _fitting(
        self, prompt: Prompt, more: int, encode: Callable[[str], tuple[list[int], list[int]]], least: int = 0
    ) -> tuple[list[int], list[int], int]:
        """Leave out as many examples, the first ones first, as it takes to fit; return the ids and their number."""
        for dropped in range(min(least, len(prompt.shots)), len(prompt.shots) + 1):
            context, targets = encode(self.text(prompt.without_first(dropped)))
            if self.max_length is None or len(context) + len(targets) + more - 1 <= self.max_length:
                break
        return context, targets, dropped

    def _border(self, text: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.chat:  # the template ends where the answer begins
            continuation = continuation.lstrip() or continuation
        stem = text.rstrip()
        continuation, text = text[len(stem) :] + continuation, stem
        context = self._context(text)
        if not text:
            return context, self._encode(continuation)
        whole = self._encode(text + continuation)
        # A tokenizer may write both in no more ids than the prompt alone; then there is no border to cut at.
        targets = whole[len(self._encode(text)) :] or self._encode(continuation)
        return context, targets

    def _context(self, text: str) -> list[int]:
        ids = [*([] if self.templated else self._mark), *self._encode(text, kept=True)] or any_mark(self.tokenizer)
        if not ids:
            raise ConfigurationError(
                "A prompt is empty and the tokenizer has no token to begin a text with; use one that has an "
                "end-of-sequence token."
            )
        return ids

    def _encode(self, text: str, *, kept: bool = False) -> list[int]:
        found = self._texts.get(text)
        if found is None:
            found = list(self.tokenizer.encode(text, allow_special=self.templated))
            if kept:
                self._texts[text] = found
        return found


def windows(ids: list[int], num_targets: int, max_length: int | None) -> Iterator[ScoredText]:
    """Yield the rows in which the last tokens of a text are scored, each once.

    If they fit into the context, there is one row, with as much before them as fits. Otherwise the first row begins at
    the first target's context, and each further one has a full context; the last one overlaps with the one before.

    Args:
        ids: The text.
        num_targets: Tokens at its end that are scored.
        max_length: Tokens that the model reads at most.
    """
    row = np.asarray(ids, dtype=np.uint32)
    first = len(ids) - num_targets
    if max_length is None or num_targets <= max_length:
        if num_targets > 0:
            yield ScoredText(row if max_length is None else row[-(max_length + 1) :], num_targets)
        return
    for start in range(first, len(ids), max_length):
        end = min(start + max_length, len(ids))
        yield ScoredText(row[max(end - max_length - 1, 0) : end], end - start)
