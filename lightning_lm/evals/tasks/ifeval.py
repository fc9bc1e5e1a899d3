"""IFEval: responses that follow the verifiable instructions of their prompts (Zhou et al. 2023, arXiv:2311.07911)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_lm.errors import DataError
from lightning_lm.evals.ifeval.instructions import INSTRUCTIONS, follows
from lightning_lm.evals.requests import Completions, Generation
from lightning_lm.evals.task import Answer, Item
from lightning_lm.evals.tasks.generation_task import GenerationTask
from lightning_lm.evals.tasks.record_task import Fields
from lightning_lm.evals.tasks.verdicts import Check, Verdict
from lightning_lm.storage.json_text import parse_json

__all__ = ["FollowsAll", "IFEval", "loose_variants"]


def loose_variants(response: str) -> list[str]:
    """Return the eight forms of a response of which one must follow an instruction, in the loose measure.

    Without the first line, the last line, or both; and each of these without asterisks.

    Args:
        response: Text of the model.
    """
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FollowsAll(Check):
    """Right if a completion follows every instruction of its prompt.

    Args:
        loose: Accept any of `loose_variants` for each.
    """

    loose: bool = False

    def __call__(self, completions: Sequence[str], gold: Any, prompt: str) -> list[Verdict]:  # noqa: ARG002
        """Check the completions."""
        return [Verdict(float(all(self.followed(text, gold))), None) for text in completions]

    def followed(self, text: str, gold: Any) -> list[bool]:
        """Return whether each instruction is followed.

        Args:
            text: A completion.
            gold: Names and arguments of the instructions.
        """
        forms = loose_variants(text) if self.loose else [text]
        return [any(follows(name, form, given) for form in forms) for name, given in gold]


_STRICT, _LOOSE = FollowsAll(), FollowsAll(loose=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IFEval(GenerationTask):
    """Prompts with verifiable instructions, from the published file ``input_data.jsonl``.

    ``prompt_strict`` is the fraction of prompts all of whose instructions are followed, ``instruction_strict`` that of
    instructions; the loose ones accept any of `loose_variants`.
    """

    name: str = "ifeval"
    split: str = "train"  # the only one there is
    question: str = "{{ prompt }}"
    id: str = "key"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 1280
    checks: Mapping[str, Check] = dataclasses.field(
        default_factory=lambda: {"prompt_strict": _STRICT, "prompt_loose": _LOOSE}
    )

    hub: ClassVar[str] = "google/IFEval"
    folders: ClassVar[tuple[str, ...]] = ("instruction_following_eval",)

    def searched_text(self, fields: Fields) -> str:
        """Return the prompt."""
        return self.written_question(fields)

    def gold_of(self, fields: Fields) -> Any:
        """Return the instructions of a prompt with their arguments.

        Raises:
            DataError: If a kind is unknown, or there are not as many arguments as instructions.
        """
        names, arguments = fields.get("instruction_id_list"), fields.get("kwargs")
        try:
            arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
        except ValueError as error:
            raise DataError(f"'kwargs' is no JSON: {error}.") from None
        if not names or not isinstance(arguments, Sequence) or len(names) != len(arguments):
            raise DataError("'instruction_id_list' and 'kwargs' must be lists of the same length, at least one.")
        unknown = [name for name in names if name not in INSTRUCTIONS]
        if unknown:
            raise DataError(f"no instruction is called {unknown[0]!r}; there are {', '.join(sorted(INSTRUCTIONS))}.")
        gold = [(name, dict(given or {})) for name, given in zip(names, arguments, strict=True)]
        _STRICT.followed("A text.", gold)  # arguments that do not fit are found before anything is asked
        return gold

    def score(self, item: Item, answers: Sequence[Answer]) -> Mapping[str, float]:
        """Return the metrics of the checks, and the mean numbers of followed instructions."""
        (answer,) = answers
        assert isinstance(answer, Completions)
        assert isinstance(item.gold, list)
        (request,) = item.requests
        assert isinstance(request, Generation)
        texts = self.answers_only(request, answer.texts)
        followed = {
            f"followed_{measure}": sum(sum(check.followed(text, item.gold)) for text in texts) / len(texts)
            for measure, check in (("strict", _STRICT), ("loose", _LOOSE))
        }
        return {**super().score(item, answers), **followed, "instructions": float(len(item.gold))}

    def aggregate(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the fractions of prompts and of instructions."""
        means = super().aggregate(scores)
        number = means.pop("instructions")
        by_instruction = {f"instruction_{one}": means.pop(f"followed_{one}") / number for one in ("strict", "loose")}
        return {**means, **by_instruction}
