"""What is public is exported, documented and importable."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import itertools
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from lightning_lm.optim import OptimizerPart
from lightning_lm.parts import Part


def modules() -> list[str]:
    """Return the dotted names of all source files, those of the mapped folders as they are once installed."""
    files = [file.relative_to(ROOT / "lightning_lm") for file in (ROOT / "lightning_lm").rglob("*.py")]
    files += [file.relative_to(ROOT) for name in ("callbacks", "strategies") for file in (ROOT / name).rglob("*.py")]
    dotted = (".".join(("lightning_lm", *file.with_suffix("").parts)) for file in files)
    return sorted(name.removesuffix(".__init__") for name in dotted)


ROOT = Path(__file__).resolve().parents[1]
MODULES = modules()
PACKAGES = [name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)]


EXPORTED = [
    (package, name)
    for package in PACKAGES
    if not package.startswith("lightning_lm.cli")
    for name in getattr(importlib.import_module(package), "__all__", [])
    if not name.startswith("__")
]
OFFERED = (Part, Callback, LightningModule, LightningDataModule, Optimizer, CheckpointIO, Strategy)
"""Kinds of classes that YAML and users name: whatever derives from them is public."""


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_exports_and_has_it(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.__all__ promises {public}"


@pytest.mark.parametrize("name", MODULES)
def test_classes_that_users_name_are_exported_by_their_package(name):
    package = ".".join(name.split(".")[:2])  # a folder within a package is a matter of its own
    outer = importlib.import_module(package)
    for public, value in vars(importlib.import_module(name)).items():
        is_offered = isinstance(value, type) and issubclass(value, OFFERED) and value.__module__ == name
        if is_offered and not public.startswith("_") and package not in ("lightning_lm", "lightning_lm.cli"):
            assert public in outer.__all__, f"{package}.__all__ lacks {public} of {name}"


@pytest.mark.parametrize(("package", "name"), EXPORTED)
def test_every_exported_name_says_what_it_is_and_what_it_takes(package, name):
    value = getattr(importlib.import_module(package), name)
    if not (inspect.isfunction(value) or isinstance(value, type)):
        return  # a constant or an alias, documented by the line below it
    docstring = inspect.getdoc(value) or ""
    assert docstring, f"{package}.{name} has no docstring"
    if isinstance(value, type) and (issubclass(value, tuple | dict | Exception) or is_protocol(value)):
        return
    missing = {taken for taken in taken_by(value) if not taken.startswith("_")} - documented_by(value)
    assert not missing, f"{package}.{name} does not say what {sorted(missing)} mean"


def test_the_one_setting_that_a_part_needs_may_come_without_its_name():
    parts = [value for package, name in EXPORTED if is_part(value := exported(package, name))]
    needed = {
        part: [field for field in dataclasses.fields(part) if field.default is field.default_factory] for part in parts
    }
    single = {
        part: fields[0] for part, fields in needed.items() if len(fields) == 1 and not issubclass(part, OptimizerPart)
    }
    assert {"CheckpointModel", "Files", "LoadTokenizer", "TokenFiles"} <= {part.__name__ for part in single}
    for part in parts:
        positional = [field for field in dataclasses.fields(part) if not field.kw_only]
        assert positional == ([single[part]] if part in single else []), part


def exported(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)


def is_part(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Part)


def is_protocol(value: type) -> bool:
    return getattr(value, "_is_protocol", False)


def taken_by(value: Any) -> set[str]:
    if isinstance(value, type) and "__init__" not in vars(value):
        return set()  # that of a class above it
    function = value.__init__ if isinstance(value, type) else value
    return set(inspect.signature(function).parameters) - {"self", "args", "kwargs"}


def documented_by(value: Any) -> set[str]:
    """Return names in the Args section, of the classes above too, and fields with a docstring of their own."""
    names: set[str] = set()
    for layer in value.__mro__ if isinstance(value, type) else [value]:
        section = re.search(r"(?:^|\n)(?:Args|Attributes):\n(.*?)(\n\S|\Z)", inspect.getdoc(layer) or "", re.DOTALL)
        if section:
            listed = re.findall(r"^\s+([\w, *]+?)(?: \(.*?\))?:", section[1], re.MULTILINE)
            names |= {word.strip(" *") for line in listed for word in line.split(",")}
        if isinstance(layer, type) and layer.__module__.startswith("lightning_lm"):
            names |= fields_with_a_docstring(layer)
    return names


def fields_with_a_docstring(cls: type) -> set[str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    pairs = itertools.pairwise(body)
    return {
        field.target.id
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
