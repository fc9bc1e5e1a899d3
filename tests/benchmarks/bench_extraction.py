"""Extraction beside resiliparse alone: CPU-seconds for the same pages, MB/s of one core.

    python tests/benchmarks/bench_extraction.py --output tests/benchmarks/results/extraction.json

Small pages of 8 kB as `bench_curation_pipeline.py` writes them, and the pages that pydoc makes of modules, of 10 to 700
kB with a tag every 20 characters. resiliparse has the same settings; our step also guards against deep nesting, takes
the title and makes a document. Both take turns page after page, every other round in the opposite order; the ratio is
that of the sums over pages of the shortest times.
"""

import argparse
import importlib
import json
import pydoc
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_curation_pipeline import write_archive
from record import write_record
from resiliparse.extract.html2text import extract_plain_text

from lightning_lm.curation import Document, Extract, Reading, as_document
from lightning_lm.curation.reading.outcome import MEDIA_TYPE

ROUNDS = 15
MODULES = "argparse ast turtle asyncio.base_events calendar collections datetime decimal doctest email.message"
MODULES += " fractions ftplib http.client inspect ipaddress logging mailbox optparse pathlib pickle statistics tarfile"


def small_pages() -> list[Document]:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "pages.warc"
        write_archive(archive, 2)
        return list(Reading().documents(archive, archive.name, "pages"))


def modules() -> list[Document]:
    pages = [pydoc.html.docmodule(importlib.import_module(name)) for name in MODULES.split()]
    pages = [pydoc.html.page(name, page) for name, page in zip(MODULES.split(), pages, strict=True)]
    return [as_document(page, metadata={MEDIA_TYPE: "text/html"}) for page in pages]


def seconds(documents: list[Document]) -> tuple[float, float]:
    """Return the sums over pages of the shortest times of our step, and of resiliparse."""
    step, clock = Extract(), time.process_time_ns
    works = (step, lambda document: extract_plain_text(document.text, main_content=True, alt_texts=False))
    times = np.full((ROUNDS, len(documents), 2), 0)
    for index in range(ROUNDS):
        for number, document in enumerate(documents):
            for column in (0, 1) if index % 2 else (1, 0):
                start = clock()
                works[column](document)
                times[index, number, column] = clock() - start
    ours, theirs = (times.min(axis=0).sum(axis=0) / 1e9).tolist()
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    results: dict[str, float] = {}
    for name, documents in (("small pages", small_pages()), ("pages of modules", modules())):
        megabytes = sum(len(document.text) for document in documents) / 1e6
        ours, theirs = seconds(documents)
        results[f"{name}, MB"] = round(megabytes, 1)
        results[f"{name}, kB each"] = round(megabytes / len(documents) * 1000)
        results[f"{name}, ours, MB/s"] = round(megabytes / ours, 1)
        results[f"{name}, resiliparse, MB/s"] = round(megabytes / theirs, 1)
        results[f"{name}, time, ours / resiliparse"] = round(ours / theirs, 3)
    print(json.dumps(results, indent=2))
    write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    main()
