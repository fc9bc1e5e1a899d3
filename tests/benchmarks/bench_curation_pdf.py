"""A PDF file of 1,000 and of 10,000 pages through reader and extraction: CPU-seconds, peak memory, and its whole text.

    python tests/benchmarks/bench_curation_pdf.py --output tests/benchmarks/results/curation_pdf.json

Each page has a running title, its number and ten lines of words after Zipf's law. What comes out must be these lines in
their order, without titles and numbers. Each size runs in a process of its own.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "curation" / "reading"))


def run(pages: int) -> None:
    from test_files import lines, pdf

    from lightning_lm.curation import Extract, Reading

    draw, body = random.Random(0), list[list[str]]()
    for _ in range(pages):
        body.append([" ".join(f"w{int(3000 ** draw.random())}" for _ in range(12)) for _ in range(10)])
    sheets = [
        lines(
            (60, 770, "Handbook of mills"), *((60, 700 - 14 * row, line) for row, line in enumerate(page)), (300, 30, n)
        )
        for n, page in enumerate(body, start=1)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "handbook.pdf"
        path.write_bytes(pdf(*sheets))
        size, begin = path.stat().st_size, time.process_time()
        (document,) = Reading().documents(path, path.name, "in")
        text = Extract()(document).text
        spent = time.process_time() - begin
    assert text.split() == [word for page in body for line in page for word in line.split()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"MB of file": round(size / 1e6, 1), "CPU-s": round(spent, 2), "peak MB": round(peak)}))


def main() -> None:
    from record import write_record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    results = {}
    for pages in (1_000, 10_000):
        command = [sys.executable, __file__, "--child", str(pages)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        results |= {f"{pages:,} pages, {name}": value for name, value in found.items()}
    print(json.dumps(results, indent=2))
    write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    run(int(sys.argv[2])) if sys.argv[1:2] == ["--child"] else main()
