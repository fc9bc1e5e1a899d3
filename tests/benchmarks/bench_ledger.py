"""A ledger of 10,000 runs: adding one, reading all, fitting them; and CPU-seconds of verbs that need no torch.

    python tests/benchmarks/bench_ledger.py --output tests/benchmarks/results/ledger.json

CPU-seconds of one thread; minimum of the rounds where there are several.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import write_record

from lightning_lm.scaling import RunLedger, RunRecord

RUNS, ROUNDS = 10_000, 7
CHILD = """
import contextlib, sys, time
from lightning_lm.cli import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.process_time(), peak, file=sys.stderr)
"""
COMMANDS = {
    "lightning-lm --help": ["--help"],
    "lightning-lm fit --help": ["fit", "--help"],
    "lightning-lm generate --help": ["generate", "--help"],
    "lightning-lm scaling --help": ["scaling", "--help"],
    "lightning-lm scaling plan --budget 1e19": ["scaling", "plan", "--budget", "1e19"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    results = {f"{name}, s": min(spent(words)[0] for _ in range(ROUNDS)) for name, words in COMMANDS.items()}
    with tempfile.TemporaryDirectory() as folder:
        ledger = RunLedger(Path(folder) / "ledger.jsonl")
        ledger.add_all([run(number) for number in range(RUNS)])
        extra = [run(RUNS + number) for number in range(ROUNDS)]
        results["one run into a ledger of 10,000, ms"] = 1e3 * min(timed(ledger.add, one) for one in extra)
        results["reading 10,000 runs, s"] = min(timed(ledger.read) for _ in range(ROUNDS))
        seconds, megabytes = spent(["scaling", "fit", str(ledger.path)])
        results["scaling fit of 10,000 runs, s"], results["scaling fit of 10,000 runs, MB"] = seconds, megabytes
    results = {name: float(f"{value:.3g}") for name, value in results.items()}
    print(results)
    write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


def run(number: int) -> RunRecord:
    """Return a run that follows the law of Hoffmann et al. 2022, with 0.3 % noise and a curve of 20 points."""
    random = np.random.default_rng(number)
    N, D = 10 ** random.uniform(5, 7.5), round(10 ** random.uniform(7, 9))
    loss = float((1.69 + 406.4 / N**0.34 + 410.7 / D**0.28) * np.exp(0.003 * random.standard_normal()))
    return RunRecord(
        parameters={"total": N}, flops_per_token={"products": 6 * N}, tokens=D, loss=loss, name=f"run {number}",
        hyper_parameters={"lr": 0.01, "seed": number}, curve=tuple((D * i / 20, loss) for i in range(1, 21)),
    )  # fmt: skip


def timed(function, *arguments) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def spent(words: list[str]) -> tuple[float, float]:
    """Return CPU-seconds and the largest memory in MB of a command in a process of its own."""
    command = [sys.executable, "-c", CHILD, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    seconds, kilobytes = map(float, done.stderr.splitlines()[-1].split())
    return seconds, kilobytes / 1e3


if __name__ == "__main__":
    main()
