"""Completions with reasoning: each phase continues the text of the one before, for all requests together."""

import dataclasses
from collections.abc import Sequence

from lightning_lm.evals.requests import Completions, EvaluatedModel, Generation

__all__ = ["complete"]


@dataclasses.dataclass
class _Draft:
    """One completion in the making: the text behind the prompt, and what the last phase used of the budget."""

    request: Generation
    place: int
    sample: int
    text: str = ""
    num_tokens: int = 0
    spent: int = 0
    dropped_shots: int = 0
    is_truncated: bool = False

    def asks(self, phase: int, stop: tuple[str, ...], most: int) -> Generation:
        """Return the request that continues the text; each phase has random numbers of its own."""
        prompt = dataclasses.replace(self.request.prompt, begun=self.request.prompt.begun + self.text)
        key = (self.request.key + self.sample + 1_000_003 * phase) % 2**56
        return dataclasses.replace(
            self.request, prompt=prompt, stop=stop, max_new_tokens=most, num_samples=1, key=key, reasoning=None
        )


def complete(model: EvaluatedModel, requests: Sequence[Generation]) -> list[Completions]:
    """Return the completions of each request, in their order; those with reasoning are written in phases.

    Their texts are the reasoning, the cue of the answer and the answer, and all tokens of the model are counted.

    Args:
        model: The model.
        requests: Prompts and settings.
    """
    plain = [place for place, request in enumerate(requests) if request.reasoning is None]
    answered = zip(plain, model.generate([requests[place] for place in plain]) if plain else [], strict=True)
    found: dict[int, Completions] = dict(answered)
    drafts = [
        _Draft(request, place, sample)
        for place, request in enumerate(requests)
        if request.reasoning is not None
        for sample in range(request.num_samples)
    ]
    if drafts:
        _reason(model, drafts)
        _answer(model, drafts)
    of_request: dict[int, list[_Draft]] = {}
    for draft in drafts:
        of_request.setdefault(draft.place, []).append(draft)
    for place, own in of_request.items():
        found[place] = Completions(
            tuple(draft.text for draft in own),
            tuple(draft.num_tokens for draft in own),
            max(draft.dropped_shots for draft in own),
            any(draft.is_truncated for draft in own),
        )
    return [found[place] for place in range(len(requests))]


def _reason(model: EvaluatedModel, drafts: Sequence[_Draft]) -> None:
    """Write the reasoning of all drafts, up to their budgets; those that stop before are told to wait."""
    waiting = list(drafts)
    for phase in range(1 + max(draft.request.reasoning.waits for draft in drafts if draft.request.reasoning)):
        asked = []
        for draft in waiting:
            how = draft.request.reasoning
            assert how is not None
            if phase:
                draft.text += how.wait
            asked.append(draft.asks(phase, _ends(draft.request), how.max_tokens - draft.spent))
        for draft, answer in zip(waiting, model.generate(asked), strict=True):
            draft.spent += answer.num_tokens[0] if answer.num_tokens[0] else 1
            _extend(draft, answer)
        waiting = [
            draft
            for draft in waiting
            if (how := draft.request.reasoning) is not None and phase < how.waits and draft.spent < how.max_tokens
        ]
        if not waiting:
            return


def _answer(model: EvaluatedModel, drafts: Sequence[_Draft]) -> None:
    for draft in drafts:
        assert draft.request.reasoning is not None
        draft.text += draft.request.reasoning.answer or ""
    last = [draft.asks(-1, draft.request.stop, draft.request.max_new_tokens) for draft in drafts]
    for draft, answer in zip(drafts, model.generate(last), strict=True):
        _extend(draft, answer)


def _extend(draft: _Draft, answer: Completions) -> None:
    draft.text += answer.texts[0]
    draft.num_tokens += answer.num_tokens[0]
    draft.dropped_shots = max(draft.dropped_shots, answer.dropped_shots)
    draft.is_truncated |= answer.is_truncated


def _ends(request: Generation) -> tuple[str, ...]:
    """Return the texts that end reasoning: not line breaks and marks, at which a short answer stops."""
    assert request.reasoning is not None
    return (*request.reasoning.end, *(stop for stop in request.stop if any(map(str.isalnum, stop))))
