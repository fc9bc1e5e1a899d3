"""Prompts of preferences that stand in both completions: their longest common beginning, as in TRL."""

from collections.abc import Mapping
from typing import Any

from lightning_lm.data.post_training.messages import Record
from lightning_lm.errors import DataError

__all__ = ["split_preference"]

_ASKING = ("question", "query", "problem", "input", "instruction", "request", "context", "user", "system")
"""Fields that are a prompt by other names."""


def split_preference(record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return prompt, preferred and other completion of a preference, finding the prompt if it is not given.

    An implicit prompt is the longest common prefix of both completions, as in TRL: of texts, a blank at its end
    goes to the completions; of conversations, it ends before an assistant's turn. A text as prompt of conversations
    that repeat it (UltraFeedback) is replaced by their shared turns.

    Args:
        record: Has ``chosen`` and ``rejected``, and may have ``prompt``.

    Raises:
        DataError: If the completions are the same, differ in kind, or have no common prompt.
    """
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if isinstance(chosen, str) is not isinstance(rejected, str):
        kinds = [type(side).__name__ for side in (chosen, rejected)]
        raise DataError(f"chosen is a {kinds[0]} and rejected a {kinds[1]}; use one kind, texts or messages.")
    if chosen == rejected:
        raise DataError(f"chosen and rejected are the same ({str(chosen)[:80]!r}); such a pair teaches nothing.")
    if isinstance(chosen, str):
        shared = 0 if prompt is not None else _shared_text(chosen, rejected)
        _refuse_other_prompts(record, shared)
        return chosen[:shared] if prompt is None else prompt, chosen[shared:], rejected[shared:]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn.get("role") == "assistant" for turn in side):
            raise DataError(f"{name} has no 'assistant' message, only {[turn.get('role') for turn in side]}.")
    if prompt is not None and all(side[0].get("role") == "assistant" for side in (chosen, rejected)):
        return prompt, chosen, rejected
    shared = _shared_turns(chosen, rejected)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _refuse_other_prompts(record: Mapping[str, Any], shared: int) -> None:
    found = [name for name in _ASKING if isinstance(record.get(name), str) and record[name].strip()]
    if record.get("prompt") is None and not shared and found:
        raise DataError(
            f"It has no 'prompt', its completions share no beginning, and {found[0]!r} would be left out. Name the "
            f"prompt: --data.train Examples --data.train.source PATH --data.train.format Columns "
            f"--data.train.format.prompt {found[0]} --data.train.format.chosen chosen --data.train.format.rejected "
            'rejected. Completions without a prompt have an empty one: "prompt": "".'
        )


def _shared_text(chosen: str, rejected: str) -> int:
    shorter = min(len(chosen), len(rejected))
    shared = next((place for place in range(shorter) if chosen[place] != rejected[place]), shorter)
    is_inside = shared < shorter
    return shared - 1 if is_inside and chosen[:shared].endswith(" ") else shared


def _shared_turns(chosen: list[Record], rejected: list[Record]) -> int:
    """Return the number of prompt turns: the common ones, up to an assistant's turn that remains in both."""
    shared, shorter = 0, min(len(chosen), len(rejected))
    while shared < shorter and chosen[shared] == rejected[shared]:
        shared += 1
    for end in range(min(shared, shorter - 1), -1, -1):
        if chosen[end].get("role") == rejected[end].get("role") == "assistant":
            return end
    roles = [[turn.get("role") for turn in side] for side in (chosen, rejected)]
    raise DataError(
        f"chosen ({roles[0]}) and rejected ({roles[1]}) share {shared} turn(s), which leaves no prompt before a turn "
        "of 'assistant' in each. Give the prompt in a field of its own, or let both begin with the same turns."
    )
