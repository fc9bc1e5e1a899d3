"""How much a reader meets from a recipe to its loss.

What is counted: one step of each recipe is run with a tiny model, from the fetch of the first micro-batch (for GRPO a
whole rollout) to the moment before the backward pass. Every function of `lightning_lm.modules`, `functional` and
`kernels` that runs is counted with its decorators and signature, without docstring, comments and blank lines; a line
counts once. The lines of the recipe and of the recipes below it are added.

What is not: in post-training, functions that run inside the model or the generator, which are read apart. For
pretraining the model is counted.

There are three limits. The first is that of the objective: a kernel is read as the formula of `lightning_lm.functional`
that it computes. The second counts the kernel as it runs on a CPU instead: what cuts the logits into chunks, looks for
Triton and makes the operator. The third also counts the other packages (prompts, rewards, tokenizers), so that nothing
is gained by moving lines there.

Jumps are counted too: the files that a reader opens who reads functions in the order in which they first run, and how
often the file changes on the way, returns to a file for another of its functions included.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import ClassVar

import pytest
import yaml
from lightning.pytorch import Callback

import lightning_lm
from lightning_lm.cli import main
from lightning_lm.functional import cross_entropy, logprobs
from lightning_lm.modules.base import LMModule
from lightning_lm.modules.rl.policy import PolicyModule

PACKAGE = Path(lightning_lm.__file__).parent
RECIPES = Path(__file__).parents[1] / "recipes"
TINY = {"class_path": "TransformerConfig", "init_args": {"d_model": 16, "num_layers": 1, "context_length": 32}}
QUIET = {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}


FORMULAS = {
    "linear_logprob": (logprobs.token_logprobs, logprobs.entropy),
    "linear_cross_entropy": (cross_entropy.token_cross_entropy,),
}
"""What the kernels that a step calls compute."""


@dataclasses.dataclass
class Reading:
    """Functions of this package in the order in which they first run within one of them.

    Args:
        start: The function that is read first.
        files: Most files, with kernels read as their formulas, and as they run.
        changes: Most changes of file, likewise.
        passed_over: Names of functions that are read another time, with all that they call.
    """

    start: Callable[..., object]
    files: tuple[int, int]
    changes: tuple[int, int]
    passed_over: tuple[str, ...] = ()
    order: dict[CodeType, None] = dataclasses.field(default_factory=dict)
    depth: int = 0

    def note(self, code: CodeType, event: str) -> None:
        started = code is inspect.unwrap(self.start).__code__
        if started or code.co_name in self.passed_over:
            step = 1 if started else -10
            self.depth += step if event == "call" else -step
        if event == "call" and self.depth == 1 and not code.co_name.startswith(("<", "__new__")):
            self.order.setdefault(code)

    def files_read(self, *, kernels: bool) -> list[str]:
        """Return the files in their order; a kernel is read as its formula, or as it runs."""
        read: list[str] = []
        for code in self.order:
            file, name = code.co_filename, Path(code.co_filename).stem
            if package_of(code) == "kernels" and not kernels:
                if name not in FORMULAS or code.co_name != name:
                    continue
                file = inspect.unwrap(FORMULAS[name][0]).__code__.co_filename
            if read[-1:] != [file]:
                read.append(file)
        return read


READINGS = {
    "grpo/reverse": (
        # Not the log-probabilities of a rollout, which are the objective's, nor its metrics.
        Reading(PolicyModule.collect, (12, 12), (20, 20), passed_over=("_compared", "record_rollout")),
        Reading(PolicyModule.collect, (20, 24), (40, 50)),
    ),
    "dpo/reverse": (Reading(LMModule.training_step, (13, 17), (23, 34)),),
    "pretrain/quickstart": (Reading(LMModule.training_step, (21, 28), (31, 54)),),
}


class Trace(Callback):
    """Notes the functions that run between the fetch of a batch and the backward pass."""

    functions: ClassVar[set[CodeType]] = set()
    read_apart: ClassVar[tuple[str, ...]] = ()
    readings: ClassVar[tuple[Reading, ...]] = ()

    def on_train_epoch_start(self, trainer, pl_module):
        Trace.functions = set()
        self.before = sys.getprofile()
        sys.setprofile(self.note)
        threading.setprofile(self.note)  # rewards run in threads

    def on_before_backward(self, trainer, pl_module, loss):
        sys.setprofile(self.before)
        threading.setprofile(None)

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "return") and package_of(frame.f_code) is not None and not is_inside(frame):
            self.functions.add(frame.f_code)
            for reading in self.readings:
                reading.note(frame.f_code, event)


def package_of(code: CodeType) -> str | None:
    """Return the package below ours in which a function lies."""
    path = Path(code.co_filename)
    return path.relative_to(PACKAGE).parts[0] if path.is_relative_to(PACKAGE) else None


def is_inside(frame: FrameType | None) -> bool:
    """Tell whether a function was called by the model or the generator, or is one of theirs."""
    while frame is not None and "/lightning/pytorch/" not in frame.f_code.co_filename:
        if package_of(frame.f_code) in Trace.read_apart:
            return True
        frame = frame.f_back
    return False


def code_lines(code: CodeType) -> set[tuple[str, int]]:
    """Return file and number of each line of a function that is code."""
    source, first = inspect.getsourcelines(code)
    text = textwrap.dedent("".join(source))
    documented = (ast.FunctionDef, ast.ClassDef)
    docstrings = [
        node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)
    ]
    left_out = {number for node in docstrings for number in range(node.lineno, node.end_lineno + 1)}
    return {
        (code.co_filename, first + number - 1)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#") and number not in left_out
    }


def recipe_lines(name: str) -> int:
    """Return the lines of a recipe and of those that it is laid over, without comments."""
    text = (RECIPES / f"{name}.yaml").read_text()
    bases = yaml.safe_load(text).get("base", [])
    own = sum(bool(line.strip()) and not line.startswith("#") for line in text.splitlines())
    return own + sum(recipe_lines(base) for base in ([bases] if isinstance(bases, str) else bases))


def overlay(recipe: str) -> dict:
    """Return settings that keep a recipe's parts and make the model small."""
    trainer = {**QUIET, "callbacks": [{"class_path": f"{__name__}.Trace"}]}
    if recipe.startswith("pretrain"):
        model = {"model": {"d_model": 16, "num_layers": 1, "context_length": 32}}
        train = {"train": "corpus.txt", "context_length": 32, "tokenizer": {"init_args": {"vocab_size": 300}}}
        return {"base": recipe, "trainer": trainer, "model": model, "data": train}
    tokenizer = {"class_path": "TrainCharacters"}
    return {
        "base": recipe,
        "trainer": trainer,
        "model": {"init_args": {"model": TINY}},
        "data": {"init_args": {"tokenizer": tokenizer}},
    }


@pytest.mark.parametrize(
    ("recipe", "limits", "read_apart"),
    [
        ("grpo/reverse", (545, 687, 1001), ("models", "generation")),
        ("dpo/reverse", (195, 337, 476), ("models",)),
        ("pretrain/quickstart", (294, 562, 990), ()),
    ],
)
def test_from_the_recipe_to_the_loss(recipe, limits, read_apart, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trace, "read_apart", read_apart)
    monkeypatch.setattr(Trace, "readings", READINGS[recipe])
    Path("corpus.txt").write_text("def main():\n    return 'the loss'\n" * 400)
    Path("tiny.yaml").write_text(yaml.safe_dump(overlay(recipe)))
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    counted = {}
    for code in Trace.functions:
        if not code.co_name.startswith("<"):  # comprehensions lie in functions
            counted.setdefault(package_of(code), set()).update(code_lines(code))
    called = {Path(code.co_filename).stem for code in Trace.functions if package_of(code) == "kernels"}
    formulas = [inspect.unwrap(function) for kernel in called for function in FORMULAS.get(kernel, ())]
    formula = set().union(*(code_lines(function.__code__) for function in formulas)) - counted["functional"]
    sizes = {package: len(lines) for package, lines in sorted(counted.items())} | {"formula": len(formula)}
    assert sizes["modules"] > 30  # else it was not seen running
    assert sizes["kernels"] > 50
    assert formula
    everything = sum(sizes.values()) - sizes["formula"] + recipe_lines(recipe)
    as_it_runs = sum(sizes[package] for package in ("modules", "functional", "kernels")) + recipe_lines(recipe)
    objective = as_it_runs - sizes["kernels"] + sizes["formula"]
    found = objective, as_it_runs, everything
    assert all(size <= limit for size, limit in zip(found, limits, strict=True)), (found, sizes)
    for reading in READINGS[recipe]:
        for kernels in (False, True):
            files = reading.files_read(kernels=kernels)
            assert 5 < len(set(files)) <= reading.files[kernels], files
            assert len(files) - 1 <= reading.changes[kernels], files
