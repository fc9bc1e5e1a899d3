"""Rewards for programs: do they pass their tests, in a sandbox."""

import ast
import contextlib
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from lightning_lm.errors import DataError
from lightning_lm.parts import Limit
from lightning_lm.rewards.answers import Reward
from lightning_lm.rewards.replay import can_replay, recording_program, scoring_program
from lightning_lm.rewards.sandbox import Sandbox
from lightning_lm.storage.json_text import parse_json

__all__ = ["CodeOutput", "CodeTests", "extract_code"]

_FENCE = re.compile(r"^([ \t>]*)(`{3,}|~{3,})[ \t]*([^\s`{]*)[^\n]*$")
_PYTHON = ("python", "python3", "py", "py3", "python2", "pycon", "ipython", "sage")


class _Block(NamedTuple):
    language: str
    code: str


def extract_code(completion: str) -> str:
    """Return the program of a completion: its last block of Python, else the last block that compiles, else all.

    Fences may be of backticks or tildes, indented, and end in CRLF. A block of output or of another language is passed
    over; the text itself is the program if there is no fence.

    Args:
        completion: A model's text.
    """
    text = completion.replace("\r\n", "\n")
    blocks = _blocks(text)
    named = [block.code for block in blocks if block.language in _PYTHON]
    unnamed = [block.code for block in blocks if not block.language]
    if named:
        return named[-1]
    if unnamed:
        return next((code for code in reversed(unnamed) if _defines(code)), unnamed[-1])
    return text if not blocks else blocks[-1].code


def _blocks(text: str) -> list[_Block]:
    blocks: list[_Block] = []
    opened: tuple[str, str, str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if opened is None:
            if match:
                opened, lines = (match[1], match[2], match[3].lower()), []
        elif match and match[2][0] == opened[1][0] and len(match[2]) >= len(opened[1]) and not match[3]:
            blocks.append(_Block(opened[2], "\n".join([*lines, ""])))
            opened = None
        else:
            lines.append(line.removeprefix(opened[0]))
    if opened is not None and lines:  # cut off before the closing fence
        blocks.append(_Block(opened[2], "\n".join([*lines, ""])))
    return blocks


def _defines(code: str) -> bool:
    """Tell whether a block is Python that does something: not the output of a program."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in body)


def source_of_tests(tests: Any) -> str:
    """Return the tests of a sample as one program.

    Args:
        tests: Python code, a list of pieces of it (MBPP's ``test_list``), or such a list as JSON text.

    Raises:
        DataError: If there is no test in it, or it is of another type.
    """
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            tests = parse_json(tests)
    pieces = [tests] if isinstance(tests, str) else tests
    if not isinstance(pieces, list | tuple) or not all(isinstance(piece, str) for piece in pieces):
        raise DataError(f"Tests must be Python code or a list of it, got {tests!r:.80}.")
    source = "\n".join(piece.replace("\r\n", "\n") for piece in pieces)
    if not source.strip():
        raise DataError("The tests of a sample are empty, so every program would pass; remove the sample.")
    return source


@dataclass(frozen=True, kw_only=True)
class CodeTests(Reward, limits={"workers": Limit.COUNT}):
    """1 if the completion's Python code passes the sample's tests, else 0.

    The tests are Python code, such as ``assert add(1, 2) == 3``, or a list of it. They run in a process of their own,
    on the plain values that the program's functions returned: an object that equals everything, a replaced ``sorted``,
    an early exit or a printed verdict do not help. Only if the tests use objects of the program's classes do they run
    in its process, where a program could find and print the word that marks success; if the policy may learn to, score
    the output of programs with `CodeOutput` instead.

    Args:
        sandbox: Limits of each program.
        column: Name of the column with the tests.
        workers: Number of programs that run at the same time.
    """

    sandbox: Sandbox = Sandbox()
    column: str = "tests"
    workers: int = 2

    limits_itself: ClassVar[bool] = True

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        tests = columns.get(self.column) or [None] * len(completions)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._passes, completions, tests))

    def _passes(self, completion: str, tests: Any) -> float | None:
        if tests is None:
            return None
        program, source = extract_code(completion), source_of_tests(tests)
        if can_replay(source):
            recorded = self.sandbox.run(recording_program(program, source))
            records = recorded.stdout.rstrip().rpartition("\n")[2]
            try:
                judge = scoring_program(records, source)
            except (ValueError, RecursionError):  # the program ended before the tests
                return 0.0
            return float(self.sandbox.run(judge).ok)
        word = secrets.token_hex(16)
        result = self.sandbox.run(f"{program}\n\n{source}\n\nprint({word!r})\n")
        return float(result.ok and result.stdout.rstrip().endswith(word))


@dataclass(frozen=True, kw_only=True)
class CodeOutput(Reward, limits={"workers": Limit.COUNT}):
    """Fraction of the sample's cases for which the completion's program prints the expected output.

    Each case is a mapping with ``input`` (given on standard input) and ``output`` (compared without blanks at the end
    of lines). The comparison is made outside the sandbox, where the program cannot reach it.

    Args:
        sandbox: Limits of each run.
        column: Name of the column with the cases.
        workers: Number of programs that run at the same time.
    """

    sandbox: Sandbox = Sandbox()
    column: str = "cases"
    workers: int = 2

    limits_itself: ClassVar[bool] = True

    @override
    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        cases = columns.get(self.column) or [None] * len(completions)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._passed, completions, cases))

    def _passed(self, completion: str, cases: Sequence[Mapping[str, str]] | None) -> float | None:
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
