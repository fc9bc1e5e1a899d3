"""Imports go down: the contracts of pyproject.toml, checked on the package as it is once installed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest


def lint(staged: Path, config: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", config]
    return subprocess.run(
        command, cwd=staged, env={**os.environ, "PYTHONPATH": str(staged)}, capture_output=True, text=True
    )


def test_the_import_contracts_hold(root, staged):
    result = lint(staged, root / "pyproject.toml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "breach"),
    [
        ("functional/planted.py", "import lightning_lm.models"),
        ("models/planted.py", "import lightning"),
        ("modules/pretrain.py", "import lightning_lm.callbacks"),
        ("callbacks/planted.py", "import triton"),
        ("unheard_of.py", "import lightning_lm.errors"),
    ],
)
def test_a_breach_would_be_reported(root, staged, tmp_path, file, breach):
    import shutil

    shutil.copytree(staged / "lightning_lm", tmp_path / "lightning_lm")
    with (tmp_path / "lightning_lm" / file).open("a") as stream:
        stream.write(f"\n{breach}\n")
    assert lint(tmp_path, root / "pyproject.toml").returncode != 0


def test_only_one_file_touches_a_private_name_of_lightning(root):
    sources = [*(root / "lightning_lm").rglob("*.py"), *(root / "callbacks").rglob("*.py")]
    for file in [*sources, *(root / "strategies").rglob("*.py")]:
        if file.name == "_lightning.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
                private = [name.name for name in node.names if name.name.startswith("_")]
                private += [part for part in (node.module or "").split(".") if part.startswith("_")]
                assert not private, f"{file}:{node.lineno} imports {private} from Lightning"


def test_no_private_attribute_of_lightning_is_read_elsewhere(root):
    owners = {"trainer", "pl_module", "datamodule", "logger", "strategy"}
    for name in ("lightning_lm", "callbacks", "strategies"):
        for file in (root / name).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and node.attr.startswith("_") and file.name != "_lightning.py":
                    owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                    assert owner not in owners or node.attr.startswith("__"), f"{file}:{node.lineno} reads {node.attr}"
                    owned = node.attr != "_trainer" or file.name == "experience_loader.py"  # which has one of its own
                    assert owned, f"{file}:{node.lineno} reads _trainer; use _lightning.trainer_of"


@pytest.mark.parametrize(
    "name",
    ["lightning_lm", "lightning_lm.functional", "lightning_lm.kernels", "lightning_lm.cli", "lightning_lm.curation"],
)
def test_a_light_import_stays_light(name, tmp_path):
    heavy = "{'lightning', 'pytorch_lightning', 'triton', 'transformers'}"
    if name == "lightning_lm.curation":  # and with it lightning_lm.data
        heavy = heavy[:-1] + ", 'torch'}"
    elif name not in ("lightning_lm.functional", "lightning_lm.kernels"):
        heavy = heavy[:-1] + ", 'torch', 'numpy'}"
    code = f"import sys, {name}; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_importing_changes_nothing_in_the_world(tmp_path):
    code = """
import logging, os, warnings
before = dict(os.environ), logging.getLogger().level, list(logging.getLogger().handlers), list(warnings.filters)
import torch; threads, state = torch.get_num_threads(), torch.get_rng_state()
before = dict(os.environ), logging.getLogger().level, list(logging.getLogger().handlers)
import lightning_lm, lightning_lm.functional, lightning_lm.models, lightning_lm.optim, lightning_lm.tokenizers
after = dict(os.environ), logging.getLogger().level, list(logging.getLogger().handlers)
assert before == after
assert threads == torch.get_num_threads() and torch.equal(state, torch.get_rng_state())
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
