"""CPU-seconds to import the package and to answer ``--help``, beside what they need anyway.

    python tests/benchmarks/bench_import.py --output tests/benchmarks/results/import.json

Each pair is started in turn, in fresh processes; the numbers are minima and the median of the paired differences.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys

from record import write_record

PAIRS = {
    "import lightning_lm": ("import lightning_lm", "pass"),
    "import lightning_lm.functional, over torch": ("import lightning_lm.functional", "import torch"),
    "import lightning_lm.models, over torch": ("import lightning_lm.models", "import torch"),
    "import lightning_lm.modules, over lightning": ("import lightning_lm.modules", "import lightning.pytorch"),
    "import lightning_lm.datamodules, over lightning": ("import lightning_lm.datamodules", "import lightning.pytorch"),
    "import lightning_lm.callbacks, over lightning": ("import lightning_lm.callbacks", "import lightning.pytorch"),
    "lightning-lm --help, over torch": ("from lightning_lm.cli import main; main(['--help'])", "import torch"),
}


def cpu_s(code: str) -> float:
    """Return user and system seconds of a fresh interpreter that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(ours: str, needed: str, rounds: int) -> dict[str, float]:
    pairs = [(cpu_s(ours), cpu_s(needed)) for _ in range(rounds)]
    return {
        "ours_cpu_s": round(min(pair[0] for pair in pairs), 3),
        "needed_cpu_s": round(min(pair[1] for pair in pairs), 3),
        "median_difference_cpu_s": round(statistics.median(a - b for a, b in pairs), 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    cpu_s("import lightning.pytorch, lightning_lm.modules")  # bytecode and the disk cache
    results = {name: measure(*pair, arguments.rounds) for name, pair in PAIRS.items()}
    for name, numbers in results.items():
        print(f"{name:50} {numbers}")
    command = f"python tests/benchmarks/bench_import.py --output {arguments.output}"
    write_record(arguments.output, command=command, results=results)
