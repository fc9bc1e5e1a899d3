"""Tasks made of the machine's own standard library: they need no download.

The items come from the modules that `lightning_lm.data.hold_out` keeps for validation, so a model that
``pretrain/quickstart`` trained has not seen them; a description that another module repeats is passed over. Another
version of Python has other modules: scores are compared on the same one.
"""

import ast
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator

from lightning_lm.data import StandardLibrary, hold_out
from lightning_lm.data.records import Place, Placed
from lightning_lm.evals.tasks.choice import ChoiceTask
from lightning_lm.evals.tasks.continuation import ContinuationTask
from lightning_lm.parts import Limit

__all__ = ["DocsChoice", "DocsCloze"]

_SHORTEST, _LONGEST = 20, 100
_NEAREST = 12
"""Descriptions of about the same length among which the wrong ones are chosen, so that length gives nothing away."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocsChoice(ChoiceTask, limits={"held_out": Limit.INSIDE_ONE}):
    """The description that belongs to a function of Python's standard library, of four; chance is 25 %.

    The description continues the header of the function, as in a source file. The split ``test`` has the functions of
    held-out modules, ``train`` those of the others.

    Args:
        held_out: Fraction of the modules that is held out, the ``validation`` of the training data.
    """

    name: str = "docs_choice"
    question: str = 'def {{ function }}({{ arguments }}):\n    """'
    delimiter: str = ""
    choices: str = "descriptions"
    metric: str = "acc_norm"
    id: str = "function"
    held_out: float = 0.05

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the functions of a split."""
        functions = _functions(self.held_out, split)
        by_length = sorted(functions, key=lambda one: (len(one["description"]), one["digest"]))
        for number, one in enumerate(functions):
            middle = by_length.index(one)
            near = by_length[max(0, middle - _NEAREST) : middle + _NEAREST + 1]
            others = sorted((other for other in near if other is not one), key=lambda other: _digest(one, other))
            choices = [other["description"] for other in others[:3]]
            right = int(_digest(one), 16) % 4
            choices.insert(right, one["description"])
            place = Place("the standard library", f"function {number}")
            yield Placed(place, {**one, "descriptions": choices, "answer": right})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocsCloze(ContinuationTask, limits={"held_out": Limit.INSIDE_ONE}):
    """The last word of the description of a function of Python's standard library, given the function's header.

    Taken are descriptions whose last word occurs in the header, so that it can be guessed.

    Args:
        held_out: As of `DocsChoice`.
    """

    name: str = "docs_cloze"
    question: str = 'def {{ function }}({{ arguments }}):\n    """{{ beginning }}'
    target: str = "{{ last }}"
    id: str = "function"
    held_out: float = 0.05

    def records(self, split: str) -> Iterator[Placed]:
        """Yield the functions of a split."""
        for number, one in enumerate(_functions(self.held_out, split)):
            beginning, _, last = one["description"].rstrip(".").rpartition(" ")
            words = set(re.findall(r"[a-z0-9]+", f"{one['function']} {one['arguments']}".lower()))
            if beginning and last.lower() in words:
                place = Place("the standard library", f"function {number}")
                yield Placed(place, {**one, "beginning": beginning, "last": last})


@functools.cache  # the sources of a running Python stay
def _functions(held_out: float, split: str) -> tuple[dict[str, str], ...]:
    """Return the documented functions of a side, in an order that does not depend on their places."""
    train, validation = hold_out(StandardLibrary(), held_out)
    wanted, others = (validation, train) if split != "train" else (train, None)
    found: dict[str, dict[str, str]] = {}
    for text in wanted.documents():
        for one in _documented(text):
            found.setdefault(one["description"], one)
    if others is not None:
        repeated = {line for text in others.documents() for line in _possible_descriptions(text)}
        found = {description: one for description, one in found.items() if description not in repeated}
    return tuple(sorted(found.values(), key=lambda one: one["digest"]))


def _documented(source: str) -> Iterator[dict[str, str]]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        lines = (ast.get_docstring(node) or "").split("\n\n")[0].split("\n")
        description = lines[0].strip()
        if len(lines) == 1 and _SHORTEST <= len(description) <= _LONGEST and " " in description:
            one = {"function": node.name, "arguments": ast.unparse(node.args), "description": description}
            yield {**one, "digest": hashlib.sha256(repr(one).encode()).hexdigest()}


def _possible_descriptions(source: str) -> Iterator[str]:
    return (line.strip().strip("\"'").strip() for line in source.split("\n"))


def _digest(*functions: dict[str, str]) -> str:
    return hashlib.sha256("".join(one["digest"] for one in functions).encode()).hexdigest()
