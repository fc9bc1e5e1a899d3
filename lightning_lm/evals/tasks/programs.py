"""Published tasks that are answered by a program, which runs in the sandbox.

HumanEval (Chen et al. 2021, arXiv:2107.03374) and MBPP (Austin et al. 2021, arXiv:2108.07732).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lightning_lm.data.records import Placed
from lightning_lm.errors import DataError
from lightning_lm.evals.requests import Generation
from lightning_lm.evals.task import Item
from lightning_lm.evals.tasks.few_shot import FirstShots, Shots
from lightning_lm.evals.tasks.generation_task import GenerationTask
from lightning_lm.evals.tasks.record_task import Fields
from lightning_lm.evals.tasks.splits import has_splits, task_folder
from lightning_lm.evals.tasks.verdicts import Check, RewardCheck
from lightning_lm.rewards import CodeTests, extract_code

__all__ = ["MBPP", "HumanEval"]

_BEHIND = re.compile(r"\n(?:class|def|#|if|print)")
"""Begin of what a model writes behind the function that it was to complete."""
_FENCE = "`" * 12


def _passes_tests() -> dict[str, Check]:
    return {"pass": RewardCheck(CodeTests(), column="tests")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HumanEval(GenerationTask):
    """Python functions to complete from signature and docstring; ``pass_pass@k`` with several completions.

    A completion continues the prompt, up to the first line that belongs to no function. One with a fenced block that
    defines the function, as chat models write, is taken as the whole program; so generation itself has no stop texts.
    """

    name: str = "humaneval"
    question: str = "{{ prompt }}"
    delimiter: str = ""
    answer: str = "tests"
    solution: str = "{{ canonical_solution }}"
    id: str = "task_id"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 1024
    checks: Mapping[str, Check] = dataclasses.field(default_factory=_passes_tests)

    hub: ClassVar[str] = "openai/openai_humaneval"
    folders: ClassVar[tuple[str, ...]] = ("openai_humaneval", "human-eval", "human_eval")

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with its tests as a program that calls them."""
        missing = [field for field in ("task_id", "prompt", "test", "entry_point") if field not in record]
        if missing:
            raise DataError(f"no field {missing[0]!r}; the record has {', '.join(map(repr, record))}.")
        return {**record, "tests": f"{record['test']}\ncheck({record['entry_point']})"}

    def searched_text(self, fields: Fields) -> str:
        """Return the signature and docstring."""
        return str(fields["prompt"])

    def completed(self, item: Item, text: str) -> str:
        """Return the program: prompt and completion, or the fenced block of a completion that defines the function."""
        (request,) = item.requests
        assert isinstance(request, Generation)
        prompt = request.prompt.question
        entry = str(item.gold).rpartition("\ncheck(")[2].rstrip(")")
        code = extract_code(text)
        program = code if code != text and f"def {entry}(" in code else prompt + _BEHIND.split(text, maxsplit=1)[0]
        if program is code:  # what the prompt imports and defines before the function is still there
            program = f"{prompt.partition(f'def {entry}(')[0]}\n{code}"
        return f"{_FENCE}python\n{program}\n{_FENCE}\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MBPP(GenerationTask):
    """Short Python programs from a description and three tests.

    The authors' file has all splits: problems 11 to 510 are the test split, 511 to 600 the validation split, from 601
    on the training split, and 2 to 4 are the examples.
    """

    name: str = "mbpp"
    subset: tuple[str, ...] = ("full/", "mbpp.jsonl")  # beside it lies the sanitized half of them
    question: str = (
        "You are an expert Python programmer, and here is your task: {{ text }} Your code should pass these tests:\n\n"
        "{{ test_list[:3] | join('\n') }}\n[BEGIN]\n"
    )
    delimiter: str = ""
    answer: str = "tests"
    solution: str = "{{ code }}\n[DONE]"
    id: str = "task_id"
    stop: tuple[str, ...] = ("[DONE]",)
    max_new_tokens: int = 512
    checks: Mapping[str, Check] = dataclasses.field(default_factory=_passes_tests)
    shots: Shots = FirstShots(num=3, split="prompt")

    hub: ClassVar[str] = "google-research-datasets/mbpp"

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the problems of a split, told by its files or by their numbers."""
        borders = {"prompt": (2, 11), "test": (11, 511), "validation": (511, 601), "train": (601, 10_000)}
        by_number = not has_splits(task_folder(self.data, (self.name, *self.folders))) if self.data else False
        for placed in super().records(self.split if by_number else split):
            number = int(placed.record.get("task_id", -1))
            first, end = borders.get(split, (0, 0))
            if not by_number or first <= number < end:
                yield placed

    def prepared(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the record with ``text`` (the sanitized version calls it ``prompt``) and all tests as a list."""
        missing = [field for field in ("task_id", "test_list") if field not in record]
        text = record.get("text", record.get("prompt"))
        if missing or text is None:
            name = missing[0] if missing else "text"
            raise DataError(f"no field {name!r}; the record has {', '.join(map(repr, record))}.")
        setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
        tests = [*([setup] if setup else []), *record["test_list"]]
        return {**record, "text": text, "tests": tests}

    def gold_of(self, fields: Fields) -> Any:
        """Return the tests, all of which must pass."""
        return list(fields["tests"])

    def searched_text(self, fields: Fields) -> str:
        """Return the description."""
        return str(fields["text"])
