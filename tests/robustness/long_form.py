"""The long form of `test_faults.py`: every kill, full disks and many flipped bits, and the table in FILES.md.

python tests/robustness/long_form.py [--flips 500] [--write]
"""

import argparse
import datetime
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from robustness.faults import fill_everywhere, flip_everywhere, kill_everywhere
from robustness.writers import WRITERS

README = Path(__file__).with_name("FILES.md")
MARK = "<!-- table of long_form.py -->\n"
LIMITS = (0, 20, 100, 150, 400, 1_000, 4_000, 20_000)


def trials(flips: int, only: str) -> list[str]:
    """Return a row of the table for each kind of files; an error ends it."""
    rows, totals = [], [0] * 5
    for writer in [writer for writer in WRITERS if only in writer.name]:
        folder = Path(tempfile.mkdtemp())
        kills = kill_everywhere(writer, folder / "kills")
        in_write = kill_everywhere(writer, folder / "writes", in_write=True)
        full = fill_everywhere(writer, folder / "full", LIMITS)
        found, harmless = flip_everywhere(
            writer, folder / "flips", -(-flips // len(WRITERS)), random.Random(1).randrange
        )
        shutil.rmtree(folder)
        counts = [kills, in_write, full, found, harmless]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        rows.append("| " + " | ".join([writer.name, *map(str, counts), "0"]) + " |")
        print(rows[-1], flush=True)
    return [*rows, "| " + " | ".join(["all", *map(str, totals), "0"]) + " |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--write", action="store_true", help="write the table into FILES.md")
    parser.add_argument("--only", default="", help="part of the name of a kind of files")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    begin = time.process_time()
    rows = trials(arguments.flips, arguments.only)
    head = "| files | kills at changes | kills in writes | full disks | bits found | bits without effect | failures |"
    note = f"{datetime.date.today()}, {time.process_time() - begin:.0f} CPU-seconds of the parent process."
    table = "\n".join([note, "", head, "|---|---|---|---|---|---|---|", *rows]) + "\n"
    print(table)
    if arguments.write:
        README.write_text(README.read_text().partition(MARK)[0] + MARK + "\n" + table)


if __name__ == "__main__":
    main()
