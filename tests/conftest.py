"""What every test shares: one thread, shapes checked at run time, the wheel that is built once."""

import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# Kernels are tested in Triton's interpreter, which must be chosen before anything imports Triton. Set it to 0 on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from jaxtyping import install_import_hook

# Annotated shapes are checked against what really flows. Must come before these packages are first imported.
install_import_hook(["lightning_lm.functional", "lightning_lm.models"], "beartype.beartype")

# Lightning takes its loggers out of the tree, and so away from `caplog`, if no handler is there when it is imported.
logging.getLogger().addHandler(logging.NullHandler())

import lightning_lm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)


# Every run tries the same examples, on a busy machine too. Python's hash seed is the only thing that varies.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


def pytest_report_header() -> str:
    """Say which copy of the package is under test: CI must test the installed wheel."""
    return f"lightning_lm: {Path(lightning_lm.__file__).parent}"


SHARED_FOLDERS = ("strategies", "demos")
"""Folders below tests whose files share what is costly to make: ranks that wait for work, a trained model."""
OF_THE_WHEEL = ("tests/test_architecture.py", "tests/test_packaging.py")
"""Files that share the wheel."""
LONGEST_FIRST = (*SHARED_FOLDERS, "kernels", "modules", "docs", "cli", "test_architecture.py", "test_packaging.py")
LONGEST_FIRST += (
    "test_readme.py",
    "test_written_before.py",
    "recipes",
    "parity",
    "robustness",
    "foreign",
    "benchmarks",
)
"""Folders and files whose tests run first, so that two workers end at the same time."""


def unit_of(nodeid: str) -> str:
    """Return what one worker runs whole: a file, or those files that share what is costly to make."""
    path = nodeid.partition("::")[0]
    if path in OF_THE_WHEEL:
        return OF_THE_WHEEL[0]
    folder = "/".join(path.split("/")[:2])
    return folder if folder in {f"tests/{name}" for name in SHARED_FOLDERS} else path


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a unit on one worker: what a file or such a folder sets up is then set up once, not once for each worker."""
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False  # by the number of tests, which says nothing of what they cost
    return ByUnit(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders that take longest."""
    order = {f"tests/{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get("/".join(item.nodeid.partition("::")[0].split("/")[:2]), len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what fixtures draw, so that no test depends on the tests that ran before it on its worker."""
    seed_everything_that_draws(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Seed what the test itself draws: a session's fixture is set up in its first test only."""
    seed_everything_that_draws(1)


def seed_everything_that_draws(seed: int) -> None:
    """Seed the global generators; a seed in the environment is for the ranks of a Trainer."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokenizers and token stores of tests out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Undo what a test did to the environment: Lightning leaves its seed there, for the ranks of the next test.

    Fixtures of a wider scope run before this one, so what they left of a seed is removed here too.
    """
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., "Scenario"]]:
    """Return a function that makes a real server, another process on this machine, answer in given steps."""
    script = Path(__file__).with_name("json_server.py")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        try:
            address = f"http://127.0.0.1:{int(process.stdout.readline())}"
            numbers = itertools.count()
            yield lambda *steps: Scenario(f"{address}/{next(numbers)}", steps)
        finally:
            process.kill()


class Scenario:
    """What the server of `serve` does, and was asked, below an address of its own."""

    def __init__(self, url: str, steps: Sequence[dict[str, Any]]) -> None:
        self.url = url
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(steps).encode(), method="PUT")).close()

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The requests so far: path, headers and body of each."""
        with urllib.request.urlopen(self.url) as answer:
            return list(json.load(answer))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout in which things may be built, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("source") / "tree"
    left_out = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "lightning_logs", "tests")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    return folder


@pytest.fixture(scope="session")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the source distribution of this checkout."""
    target = tmp_path_factory.mktemp("sdist")
    backend = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", backend, target], cwd=source, check=True, capture_output=True)
    return next(target.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel built from the source distribution, as an index would serve it."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", target, sdist]
    subprocess.run(command, check=True, capture_output=True)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="session")
def staged(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the package as it is once installed; tools that cannot see the mapping read this."""
    target = tmp_path_factory.mktemp("stage")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target
