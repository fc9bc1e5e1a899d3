"""The sizes that keep the code readable. Docstrings do not count against a function."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(file for name in ("lightning_lm", "callbacks", "strategies") for file in (ROOT / name).rglob("*.py"))
OBJECTIVES = ("dpo", "grpo", "kto", "ppo", "pretrain", "reward", "rl/experience_loader", "rl/policy", "sft")
MAX_OBJECTIVE = 350
MAX_MODULE, MAX_CLASS, MAX_FUNCTION, MAX_KERNEL, MAX_PARAMETERS, MAX_OVERLAY = 400, 250, 50, 120, 8, 30


def body_lines(node: ast.AST) -> int:
    statements = node.body
    if isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant):
        statements = statements[1:]
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sizes(file):
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_MODULE, f"{file} is too long: divide it"
    for node in ast.walk(ast.parse(text)):
        place = f"{file}:{getattr(node, 'lineno', 0)} {getattr(node, 'name', '')}"
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_CLASS, place
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert body_lines(node) <= (MAX_KERNEL if is_kernel(node) else MAX_FUNCTION), place
            assert is_kernel(node) or len(parameters(node)) <= MAX_PARAMETERS, place


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_short(name):
    text = (ROOT / "lightning_lm" / "modules" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= MAX_OBJECTIVE, f"{name}.py is too long: what is it apart from its objective?"


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda file: file.stem)
def test_overlays_are_thin(file):
    assert len(file.read_text().splitlines()) <= MAX_OVERLAY


def test_no_drawer_for_odds_and_ends():
    for file in SOURCES:
        assert file.stem not in ("utils", "util", "common", "helpers", "misc"), file


def test_no_unfinished_business():
    for file in SOURCES:
        for word in ("TODO", "FIXME", "XXX"):
            assert word not in file.read_text(), f"{file} holds a {word}"
