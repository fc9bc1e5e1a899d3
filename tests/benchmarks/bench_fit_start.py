"""CPU-seconds from ``lightning-lm fit`` to the first training step, on text whose tokens are cached.

    python tests/benchmarks/bench_fit_start.py --output tests/benchmarks/results/fit_start.json --earlier PYTHON

Fresh processes in turns; the numbers are minima. Lightning's own command line is imported beside them, which is the
floor. ``--earlier`` is the interpreter of an environment with an earlier version of the package.
"""

import argparse
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from record import write_record

FLOOR = "import lightning.pytorch.cli"
STOP = """
from lightning.pytorch import Callback

class Stop(Callback):
    def on_train_start(self, trainer, pl_module):
        raise SystemExit(0)
"""
FIT = (
    "from lightning_lm.cli import main; main(['fit', '--config', 'pretrain/quickstart', '--data.train', 'corpus', "
    "'--trainer.accelerator', 'cpu', '--trainer.callbacks+=stop.Stop'])"
)


def cpu_s(python: str, code: str, folder: Path) -> float:
    """Return user and system seconds of a fresh interpreter that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([python, "-c", code], check=True, cwd=folder, env=environment, **quiet)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare(folder: Path) -> None:
    """Write a corpus, and the callback that ends a run before its first step."""
    (folder / "stop.py").write_text(STOP)
    (folder / "corpus").mkdir()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        (folder / "corpus" / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8", errors="replace"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--earlier", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    runs = {"fit until the first step": (sys.executable, FIT), FLOOR: (sys.executable, FLOOR)}
    if arguments.earlier:
        runs["fit until the first step, earlier version"] = (arguments.earlier, FIT)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for run in runs.values():
            cpu_s(*run, Path(name))  # bytecode, disk cache and tokens
        times = {title: [] for title in runs}
        for _ in range(arguments.rounds):
            for title, run in runs.items():
                times[title].append(cpu_s(*run, Path(name)))
    results = {title: {"cpu_s": round(min(values), 2)} for title, values in times.items()}
    print(*results.items(), sep="\n")
    command = f"python tests/benchmarks/bench_fit_start.py --output {arguments.output} --earlier PYTHON"
    write_record(arguments.output, command=command, results=results)
