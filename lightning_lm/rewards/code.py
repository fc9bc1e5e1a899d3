"""Rewards for programs: do they pass their tests, in a sandbox."""

import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from lightning_lm.rewards.answers import Reward
from lightning_lm.rewards.sandbox import Sandbox

__all__ = ["CodeOutput", "CodeTests", "extract_code"]

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def extract_code(completion: str) -> str:
    """Return the last fenced block of a completion, or all of it where there is none.

    Args:
        completion: What a model wrote.
    """
    blocks = _FENCE.findall(completion)
    return str(blocks[-1]) if blocks else completion


@dataclass(frozen=True, kw_only=True)
class CodeTests(Reward):
    """1 where the completion's Python code passes the sample's tests, else 0.

    The tests are Python code, such as ``assert add(1, 2) == 3``, that runs after the completion's and in the same
    process. A program that ends itself early has not passed: a word it cannot guess must be printed after the last
    test. A program that goes looking for that word in its own process could find it; where the policy may learn to,
    judge what programs print with `CodeOutput` instead.

    Args:
        sandbox: Limits of each program.
        column: The column that holds the tests.
        workers: Programs that run at the same time.
    """

    sandbox: Sandbox = Sandbox()
    column: str = "tests"
    workers: int = 2

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        tests = columns.get(self.column) or [None] * len(completions)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._passes, completions, tests))

    def _passes(self, completion: str, tests: str | None) -> float | None:
        if tests is None:
            return None
        word = secrets.token_hex(16)
        result = self.sandbox.run(f"{extract_code(completion)}\n\n{tests}\n\nprint({word!r})\n")
        return float(result.ok and result.stdout.rstrip().endswith(word))


@dataclass(frozen=True, kw_only=True)
class CodeOutput(Reward):
    """The share of the sample's cases for which the completion's program prints what it should.

    Each case is a mapping with ``input`` (given on standard input) and ``output`` (compared without blanks at the end
    of lines). The comparison is made outside the sandbox, where the program cannot reach it.

    Args:
        sandbox: Limits of each run.
        column: The column that holds the cases.
        workers: Programs that run at the same time.
    """

    sandbox: Sandbox = Sandbox()
    column: str = "cases"
    workers: int = 2

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        cases = columns.get(self.column) or [None] * len(completions)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._share, completions, cases))

    def _share(self, completion: str, cases: Sequence[Mapping[str, str]] | None) -> float | None:
        if not cases:
            return None
        code = extract_code(completion)
        results = [self.sandbox.run(code, stdin=case["input"]) for case in cases]
        right = [
            result.ok and _lines(result.stdout) == _lines(case["output"])
            for result, case in zip(results, cases, strict=True)
        ]
        return sum(right) / len(right)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
