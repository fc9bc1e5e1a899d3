"""Memory of turning text into a token store, of all processes together, by the size of the text.

    python tests/benchmarks/bench_tokenize_memory.py --output tests/benchmarks/results/tokenize_memory.json

The text is the standard library's source, in JSON lines, repeated with names of its own in every document, so that the
number of distinct words grows with it. Memory is the sum over all processes of what is theirs (``Pss`` of smaps_rollup:
pages shared by forks or files count by their part), sampled 20 times a second; "anonymous" leaves files out, which the
system may drop. The peak must grow by less than a tenth from the smallest text to the largest.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from record import write_record

from lightning_lm.data import Files, StandardLibrary, tokenize
from lightning_lm.tokenizers import load_tokenizer
from lightning_lm.tokenizers.bpe import BPETokenizer

PAUSE_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        tokenize_in(arguments.child, arguments.num_workers)
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        sample = [text for _, text in zip(range(400), StandardLibrary().documents(), strict=False)]
        BPETokenizer.train(sample, 4096, num_workers=1).save(Path(folder) / "tokenizer")
        for megabytes in arguments.megabytes:
            results.append(measured(Path(folder), megabytes, arguments.num_workers))
            print(results[-1], flush=True)
    growth = results[-1]["anonymous peak, MB"] / results[0]["anonymous peak, MB"] - 1
    print(f"growth: {growth:.1%}")
    if arguments.output is not None:
        sizes = {"num_workers": arguments.num_workers, "growth of the anonymous peak": round(growth, 3)}
        write_record(
            arguments.output, command=f"python {' '.join(sys.argv)}", results={**sizes, "by size of text": results}
        )


def measured(folder: Path, megabytes: int, num_workers: int) -> dict[str, float]:
    text = folder / "text.jsonl"
    with text.open("w", encoding="utf-8") as file:
        for document in documents(megabytes * 10**6):
            file.write(json.dumps({"text": document}) + "\n")
    command = [sys.executable, __file__, "--child", str(folder), "--num-workers", str(num_workers)]
    begin, peaks = time.monotonic(), {"Pss_Anon": 0.0, "Pss": 0.0}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            for name, size in sizes(process.pid).items():
                peaks[name] = max(peaks[name], size)
            time.sleep(PAUSE_S)
    assert process.returncode == 0
    store = sum(path.stat().st_size for path in (folder / "store").iterdir())
    text.unlink()
    for path in (folder / "store").iterdir():
        path.unlink()
    return {
        "text, MB": megabytes,
        "store, MB": round(store / 1e6, 1),
        "anonymous peak, MB": round(peaks["Pss_Anon"], 1),
        "peak with files, MB": round(peaks["Pss"], 1),
        "wall, s": round(time.monotonic() - begin, 1),
    }


def documents(num_bytes: int) -> Iterator[str]:
    """Yield texts until their sizes add up, each with names that no other has."""
    library, written, number = list(StandardLibrary().documents()), 0, random.Random(0)
    while True:
        for text in library:
            names = iter(f"n{number.getrandbits(48):x}" for _ in range(len(text)))
            changed = re.sub(r"\bself\.\w+", lambda _, names=names: f"self.{next(names)}", text)
            yield changed
            written += len(changed.encode())
            if written >= num_bytes:
                return


def tokenize_in(folder: Path, num_workers: int) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenize(
        Files(path=str(folder / "text.jsonl")),
        tokenizer,
        folder / "store",
        num_workers=num_workers,
        show_progress=False,
    )


def sizes(pid: int) -> dict[str, float]:
    """Return the memory of a process and all below it, in MB."""
    totals = {"Pss_Anon": 0.0, "Pss": 0.0}
    for process in below(pid):
        try:
            rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        for row in rows:
            name, _, rest = row.partition(":")
            if name in totals:
                totals[name] += int(rest.split()[0]) / 1024
    return totals


def below(pid: int) -> list[int]:
    found = [pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
