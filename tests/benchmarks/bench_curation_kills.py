"""The pipeline `curation/web` killed 30 times at random moments and run again: the output is the same byte for byte.

    python tests/benchmarks/bench_curation_kills.py --output tests/benchmarks/results/curation_kills.json

The command runs with two processes on archives of 4 MB and gets SIGKILL after a time drawn from the whole length of a
run: every other time all of its processes do, else the first one alone. It is run again each time, and resumes. When it
ends before the signal, its output is compared with that of an undisturbed run, and removed to begin anew. After the
last kill it runs to its end and is compared once more.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_curation_pipeline import write_archive
from record import write_record

KILLS, MEGABYTES, FILES = 30, 4, 4


def start(archives: Path, output: Path) -> subprocess.Popen:
    call = "import sys; from lightning_lm.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["curate", "--config", "curation/web", "--input", str(archives), "--output", str(output)]
    command = [sys.executable, "-c", call, *words, "--num-workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill(child: subprocess.Popen, *, group: bool) -> None:
    (os.killpg if group else os.kill)(child.pid, signal.SIGKILL)
    child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw, moments, finished, resumed = random.Random(0), list[float](), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archives, output = folder / "archives", folder / "clean"
        archives.mkdir()
        for number in range(FILES):
            write_archive(archives / f"{number}.warc", MEGABYTES / FILES, number)
        begin = time.perf_counter()
        assert start(archives, folder / "expected").wait() == 0
        length = time.perf_counter() - begin
        expected = content(folder / "expected")
        while len(moments) < KILLS:
            resumed += any(folder.glob("clean.partial/*"))
            child, moment = start(archives, output), draw.uniform(0, length)
            try:
                assert child.wait(moment) == 0
            except subprocess.TimeoutExpired:
                kill(child, group=len(moments) % 2 == 0)
                moments.append(round(moment, 2))
            else:
                assert content(output) == expected
                shutil.rmtree(output)
                finished += 1
        assert start(archives, output).wait() == 0
        assert content(output) == expected
        assert not list(folder.glob("clean.*"))
    results = {
        "kills": len(moments),
        "of all processes": (len(moments) + 1) // 2,
        "seconds of an undisturbed run": round(length, 2),
        "seconds after which each was killed": moments,
        "runs that found parts of the one before": resumed,
        "runs that ended, compared byte for byte": finished + 1,
        "differences": 0,
        "MB of output": round(sum(map(len, expected.values())) / 1e6, 1),
    }
    print(json.dumps(results, indent=2))
    write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    main()
