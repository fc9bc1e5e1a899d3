"""Beam search: the likeliest completions that a narrow search finds, rather than a sample."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation.forward import forward_for
from lightning_lm.generation.prompt_checks import check_ids, check_length

__all__ = ["Beam", "beam_search"]


@dataclasses.dataclass(frozen=True, order=True)
class Beam:
    """One completion that was found.

    Args:
        score: Log-probability of the completion in nats, divided by its length to the power of the length penalty.
        token_ids: The completion; an id that ended it is its last.
    """

    score: float
    token_ids: tuple[int, ...]


@torch.inference_mode()
def beam_search(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    stop_ids: Iterable[int] = (),
    length_penalty: float = 1.0,
) -> list[list[Beam]]:
    """Return the best completions to each prompt, the best first.

    At each step every beam is continued with every token, and the ``num_beams`` likeliest continuations stay. A prompt
    is done when none of its beams can still beat the completions that have ended. Call ``model.eval()`` first.

    Args:
        model: As for `lightning_lm.generation.Generator`.
        prompts: Token ids.
        num_beams: Number of hypotheses kept at each step, and the most that are returned.
        max_new_tokens: Most tokens of a completion; one that reaches it has ended.
        stop_ids: Ids that end a completion, such as the tokenizer's ``eos_id``.
        length_penalty: 0 compares probabilities, which favours short completions; 1 the mean log-probability per token.

    Raises:
        ConfigurationError: If a number is out of range, the text too long for learned positions, or the logits NaN.

    Source:
        Graves 2012, arXiv:1211.3711, section 3; length penalty: Wu et al. 2016, arXiv:1609.08144, section 7, in the
        simpler form ``length ** penalty``.
    """
    if num_beams < 1 or max_new_tokens < 1 or length_penalty < 0 or not all(prompts):
        raise ConfigurationError(
            f"num_beams={num_beams} and max_new_tokens={max_new_tokens} must be at least 1, "
            f"length_penalty={length_penalty} at least 0, and every prompt needs a token."
        )
    if not prompts:
        return []
    check_ids(model, prompts)
    check_length(model, max(map(len, prompts)), max_new_tokens)
    options = _Options(num_beams, max_new_tokens, frozenset(stop_ids), length_penalty)
    searches = [_Search(options) for _ in prompts]
    forward = forward_for(model, prompts, max_new_tokens)
    logits = forward.prefill()
    while rows := _advance(searches, logits):
        forward.select(torch.tensor(rows, device=logits.device))
        newest = [ids[-1] for search in searches for _, ids in search.beams]
        logits = forward.step(torch.tensor(newest, device=logits.device))
    return [search.best() for search in searches]


def _advance(searches: Sequence["_Search"], logits: Tensor) -> list[int]:
    """Continue all beams, one row of logits each; return the rows that the new ones continue."""
    scores = [score for search in searches for score, _ in search.beams]
    totals = logits.double().log_softmax(dim=-1) + torch.tensor(scores, dtype=torch.float64)[:, None].to(logits.device)
    rows, first = [], 0
    for search in searches:
        count = len(search.beams)
        if count:
            rows += [first + parent for parent in search.advance(totals[first : first + count])]
        first += count
    return rows


@dataclasses.dataclass(frozen=True)
class _Options:
    num_beams: int
    max_new_tokens: int
    stop_ids: frozenset[int]
    length_penalty: float


class _Search:
    """The search for completions to one prompt."""

    def __init__(self, options: _Options) -> None:
        self.options = options
        self.beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        """Log-probability and ids of each unfinished completion, the likeliest first; none when the search is done."""
        self._ended: list[Beam] = []

    def advance(self, totals: Tensor) -> list[int]:
        """Take the best continuations, from log-probabilities [beams, vocab]; return the beams that they continue."""
        # Each beam has a continuation with each stop id, so among this many are num_beams unfinished ones.
        count = min(self.options.num_beams * (1 + len(self.options.stop_ids)), totals.numel())
        best = totals.flatten().topk(count)
        beams: list[tuple[float, tuple[int, ...]]] = []
        parents: list[int] = []
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            parent, token = divmod(place, totals.shape[1])
            ids = (*self.beams[parent][1], token)
            if not math.isfinite(score) or len(beams) == self.options.num_beams:
                break
            if token in self.options.stop_ids or len(ids) == self.options.max_new_tokens:
                self._ended.append(Beam(score / len(ids) ** self.options.length_penalty, ids))
            else:
                beams.append((score, ids))
                parents.append(parent)
        self._ended = sorted(self._ended, reverse=True)[: self.options.num_beams]
        self.beams = beams if beams and self._may_improve(beams[0][0]) else []
        return parents if self.beams else []

    def best(self) -> list[Beam]:
        """Return the completions that have ended, the best first."""
        if not self._ended:
            raise ConfigurationError("The model returned NaN logits, so no token can be chosen.")
        return self._ended

    def _may_improve(self, score: float) -> bool:
        """Return whether a beam can still beat the worst completion, if it reached the greatest length at no cost."""
        if len(self._ended) < self.options.num_beams:
            return True
        longest = float(self.options.max_new_tokens)
        return score / math.pow(longest, self.options.length_penalty) > self._ended[-1].score
