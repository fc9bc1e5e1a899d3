"""Run tests of Lightning's own suite under `ddp` and under strategies of this package, and name what fails only there.

    python tests/foreign/compare_strategies.py ~/pytorch-lightning/tests
    python tests/foreign/compare_strategies.py ~/pytorch-lightning/tests --ranks 2 tests_pytorch/models/test_hooks.py

Nothing is fetched: the sources are given. Exits with 1 if a test fails under a strategy and passes under `ddp`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch import distributed

PATHS = (
    "models/test_hooks.py",
    "models/test_restore.py",
    "models/test_amp.py",
    "trainer/optimization",
    "trainer/test_trainer.py",
    "trainer/connectors/test_checkpoint_connector.py",
    "checkpointing",
    "callbacks/test_finetuning_callback.py",
    "callbacks/test_gradient_accumulation_scheduler.py",
    "callbacks/test_lr_monitor.py",
    "callbacks/test_pruning.py",
    "callbacks/test_stochastic_weight_avg.py",
    "callbacks/test_weight_averaging.py",
    "core/test_lightning_module.py",
    "core/test_lightning_optimizer.py",
    "loops",
    "plugins/precision",
    "strategies/test_ddp.py",
    "strategies/test_ddp_integration.py",
    "tuner",
)
"""Parts of the suite in which optimizers step, gradients are clipped or accumulated, and checkpoints are written."""


def run(sources: Path, strategy: str, num_ranks: int, arguments: Sequence[str]) -> dict[str, str]:
    """Return how each test ended: "passed", "skipped", or on which rank and why it failed.

    Args:
        sources: Folder that holds ``tests_pytorch``.
        strategy: "ddp", "zero1" or "zero2".
        num_ranks: Number of processes.
        arguments: Of pytest: files and options.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(hours=1))
        outcomes = [Path(folder) / f"{rank}.jsonl" for rank in range(num_ranks)]
        for outcome in outcomes:
            outcome.touch()
        processes = []
        for rank, outcome in enumerate(outcomes):
            ours = [
                "--under",
                strategy,
                "--ranks",
                str(num_ranks),
                "--outcomes",
                str(outcome),
                "--folder",
                f"{folder}/tmp",
            ]
            if num_ranks > 1:
                ours += ["--store", str(store.port)]
            command = [sys.executable, "-m", "pytest", "-q", "-p", "strategy_plugin", "-p", "no:cacheprovider"]
            processes.append(
                subprocess.Popen(
                    [*command, "-o", "addopts=", "--basetemp", f"{folder}/base{rank}", *ours, *arguments],
                    cwd=sources,
                    env=_environment(sources, rank, num_ranks),
                    stdout=subprocess.DEVNULL if rank else sys.stderr,
                )
            )
        for process in processes:
            process.wait()
        return _merged([[json.loads(line) for line in outcome.read_text().splitlines()] for outcome in outcomes])


def _environment(sources: Path, rank: int, num_ranks: int) -> dict[str, str]:
    path = os.pathsep.join([str(sources), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if num_ranks > 1:
        environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "localhost"}
    return environment


def _merged(ranks: Sequence[Sequence[dict[str, str]]]) -> dict[str, str]:
    tests: dict[str, str] = {}
    for rank, lines in enumerate(ranks):
        for line in lines:
            before = tests.setdefault(line["test"], "passed")
            if line["outcome"] == "failed" and not before.startswith("rank"):
                tests[line["test"]] = f"rank {rank}, {line['phase']}: {line['said']}"
            elif line["outcome"] == "skipped" and before == "passed":
                tests[line["test"]] = "skipped"
    return tests


def only_there(under_ddp: dict[str, str], under_other: dict[str, str]) -> dict[str, str]:
    """Return what passes under `ddp` and not under another strategy, with the reason.

    Args:
        under_ddp: As `run` returns it.
        under_other: The same.
    """
    passed = [test for test, outcome in under_ddp.items() if outcome == "passed"]
    return {test: under_other.get(test, "did not run") for test in passed if under_other.get(test) != "passed"}


def _counts(outcomes: dict[str, str]) -> str:
    passed, skipped = (sum(outcome == kind for outcome in outcomes.values()) for kind in ("passed", "skipped"))
    return f"{passed} passed, {len(outcomes) - passed - skipped} failed, {skipped} skipped"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print the counts and every difference.

    Args:
        arguments: Those of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="folder that holds tests_pytorch")
    parser.add_argument("--strategy", action="append", choices=("zero1", "zero2"), help="by default both")
    parser.add_argument("--ranks", type=int, default=1, help="number of processes")
    given, others = parser.parse_known_args(arguments)
    known = [f"tests_pytorch/{path}" for path in PATHS if (given.sources / "tests_pytorch" / path).exists()]
    selected = others if any(not other.startswith("-") for other in others) else [*known, *others]
    under_ddp = run(given.sources, "ddp", given.ranks, selected)
    print(f"ddp    {_counts(under_ddp)}")
    found = False
    for strategy in given.strategy or ("zero1", "zero2"):
        outcomes = run(given.sources, strategy, given.ranks, selected)
        print(f"{strategy}  {_counts(outcomes)}")
        for test, outcome in only_there(under_ddp, outcomes).items():
            found = True
            print(f"  only under {strategy}: {test}\n    {outcome}")
    return int(found or not under_ddp)


if __name__ == "__main__":
    sys.exit(main())
