"""Questions about the functions of Python's standard library, answered from its documentation.

Real text that every machine has, in a form and with facts that a published model does not know: enough to see
fine-tuning and preferences work on a real model within minutes.
"""

import ast
import functools
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lightning_lm.data.post_training.examples import ExampleSource, Record
from lightning_lm.data.standard_library import StandardLibrary
from lightning_lm.errors import ConfigurationError, DataError

__all__ = ["DocumentedFunctions"]

Question = Literal["card", "module", "brief"]
_LEFT_OUT = ("antigravity", "distutils", "encodings", "idlelib", "lib2to3", "this", "tkinter", "turtledemo")
_LONGEST_SUMMARY, _LONGEST_DETAILS, _SHORTEST_DETAILS = 90, 400, 80
_WORDINGS = (
    "Which module of Python's standard library has the function `{name}`?",
    "Where in Python's standard library is `{name}` defined?",
    "I want to call `{name}`. What do I have to import?",
)
_HELD_OUT_WORDING = "Name the module of Python that the function `{name}` belongs to."


class _Function(NamedTuple):
    module: str
    name: str
    header: str
    arguments: tuple[str, ...]
    summary: str
    details: str


@dataclass(frozen=True, kw_only=True)
class DocumentedFunctions(ExampleSource):
    """Questions about functions of the running Python's standard library, with answers from its documentation.

    Fields: ``prompt``, ``completion``, ``answer`` (the same) and ``question``; of ``brief`` also ``chosen`` (the same)
    and ``rejected``. The questions are

    * ``card``: a function with its documentation is given, a reference card of three lines is wanted: name, number and
      names of the arguments, summary. Held out are functions of other modules, so that only the form can be known.
    * ``module``: the name alone is given, the module is wanted. Held out is another wording for the same functions, so
      that the facts must be known and the words cannot.
    * ``brief``: what a function does, in its one-line summary; the whole documentation is rejected. Held out are
      functions of other modules.

    Args:
        questions: Number of functions to ask about, by the question; of ``module``, each is asked in three wordings.
        held_out: Give held-out questions.
        seed: Seed of the order of the questions. Which functions are asked about does not depend on it.

    Raises:
        ConfigurationError: If a question is unknown, or a number below 1.
    """

    questions: Mapping[Question, int] = field(kw_only=False)
    held_out: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("card", "module", "brief")
        wrong = [f"{name}: {number}" for name, number in self.questions.items() if name not in known or number < 1]
        if wrong or not self.questions:
            got = ", ".join(wrong) or "none"
            raise ConfigurationError(f"questions must be some of {known} with a number of at least 1, got {got}.")

    def records(self) -> Iterator[Record]:
        """Yield the records.

        Raises:
            DataError: If the library has fewer functions of a kind, or comes without its sources.
        """
        found = [record for name, number in self.questions.items() for record in self._asked(name, number)]
        yield from random.Random(self.seed).sample(found, len(found))

    def _asked(self, question: Question, number: int) -> list[Record]:
        functions = [one for one in _functions() if question != "brief" or len(one.details) > _SHORTEST_DETAILS]
        if question == "module":
            counts = Counter(one.name for one in functions)
            functions = [one for one in functions if counts[one.name] == 1]
        else:
            functions = [one for one in functions if _is_held_out(one.module) == self.held_out]
        if len(functions) < number:
            raise DataError(
                f"This Python documents {len(functions)} functions that can be asked about as {question!r}"
                f"{' and are held out' if self.held_out else ''}, not {number}; ask for fewer."
            )
        ask = {"card": _card, "module": self._module, "brief": _brief}[question]
        return [record for one in functions[:number] for record in ask(one)]

    def _module(self, function: _Function) -> list[Record]:
        wordings = (_HELD_OUT_WORDING,) if self.held_out else _WORDINGS
        answer = f"`{function.name}` is in `{function.module}`."
        return [_record("module", words.format(name=function.name), answer) for words in wordings]


def _card(function: _Function) -> list[Record]:
    given = f'def {function.name}({function.header}):\n    """{function.summary}"""'
    prompt = f"Write the reference card of this function of the module `{function.module}`.\n\n{given}"
    names = ", ".join(function.arguments) or "none"
    lines = (f"{function.module}.{function.name}", f"arguments ({len(function.arguments)}): {names}", function.summary)
    answer = "\n* ".join(lines)
    return [_record("card", prompt, answer)]


def _brief(function: _Function) -> list[Record]:
    prompt = f"What does the function `{function.name}` of Python's module `{function.module}` do?"
    rejected = f"{function.summary}\n\n{function.details}"
    return [{**_record("brief", prompt, function.summary), "chosen": function.summary, "rejected": rejected}]


def _record(question: Question, prompt: str, answer: str) -> Record:
    return {"prompt": prompt, "completion": answer, "answer": answer, "question": question}


@functools.cache  # the sources of a running Python stay
def _functions() -> tuple[_Function, ...]:
    """Return the documented functions, each at a place that no seed changes."""
    found = [
        function
        for module, text in StandardLibrary().modules()
        if module.split(".")[0] not in _LEFT_OUT and not any(part.startswith("_") for part in module.split("."))
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and (function := _documented(module, node)) is not None
    ]
    return tuple(sorted(found, key=lambda one: _digest(f"{one.module}.{one.name}")))


def _documented(module: str, node: ast.FunctionDef) -> _Function | None:
    text = ast.get_docstring(node)
    if text is None or node.name.startswith("_"):
        return None
    summary, _, details = text.partition("\n\n")
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    summary = " ".join(summary.split())
    if not summary.endswith(".") or len(summary) > _LONGEST_SUMMARY:
        return None
    names = tuple(argument.arg for argument in arguments)
    cut = details[:_LONGEST_DETAILS].rpartition(" ")[0] if len(details) > _LONGEST_DETAILS else details
    return _Function(module, node.name, ast.unparse(node.args), names, summary, cut.strip())


def _is_held_out(module: str) -> bool:
    """Tell whether a module is one of the fifth whose functions are never trained on."""
    return _digest(module.split(".")[0]) % 5 == 0


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
