"""The pipeline `curation/web` on WARC beside datatrove's local executor: CPU-seconds, and memory over the input's size.

    pip install warcio faust-cchardet python-magic orjson "xxhash<4"
    python tests/benchmarks/bench_curation_pipeline.py --output tests/benchmarks/results/curation_pipeline.json

The archives are written here: pages of about 9 kB, pieces of Python's language reference between menus and notices, one
in ten a copy of an earlier page with words exchanged. Both run with two processes. datatrove's steps are those nearest
to ours: its WARC reader, the same extraction by resiliparse (its own, trafilatura, is ten times slower), py3langid on
as many characters (its own, fastText, downloads its model), its Gopher, C4 and FineWeb filters with words between white
space, its masks, and its four stages of MinHash with 16 x 8. Memory is the proportional set size (PSS) of all processes
together, sampled five times a second.
"""

import argparse
import importlib.machinery
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from pydoc_data.topics import topics

MENU = "".join(f'<li><a href="/{name}">{name}</a></li>' for name in ("home", "news", "travel", "sport", "about"))
WORKERS = 2


def write_archive(path: Path, megabytes: float, seed: int = 0) -> None:
    draw = random.Random(seed)
    words = " ".join(topics.values()).split()
    pages: list[list[str]] = []
    size = number = 0
    with path.open("wb") as file:
        while size < megabytes * 1e6:
            if pages and draw.random() < 0.1:
                paragraphs = [text.replace(" the ", " this ", 1) for text in draw.choice(pages)]
            else:
                starts = [draw.randrange(len(words) - 90) for _ in range(12)]
                paragraphs = [" ".join(words[start : start + draw.randint(40, 90)]) + "." for start in starts]
                pages = [*pages[-99:], paragraphs]
            text = "".join(f"<p>{paragraph.replace('<', '&lt;')}</p>" for paragraph in paragraphs)
            page = f"<html><head><title>{number}</title><script>{'var a = 1;' * 200}</script></head><body><nav>"
            page += f"<ul>{MENU * 4}</ul></nav>"
            page += f"<main>{text}</main><footer><p>All rights reserved, {number}</p></footer></body></html>"
            body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page.encode()
            header = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://a.example/{number}\r\n"
            header += f"WARC-Record-ID: <urn:uuid:{number:032x}>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
            header += "WARC-Identified-Payload-Type: text/html\r\nContent-Type: application/http; msgtype=response\r\n"
            size += file.write(header.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n")
            number += 1


def ours(archives: Path, output: Path) -> int:
    from lightning_lm.cli import main

    words = ["curate", "--config", "curation/web", "--input", str(archives), "--output", str(output)]
    return main([*words, "--num-workers", str(WORKERS)])


def datatrove(archives: Path, output: Path) -> int:
    magic = types.ModuleType("magic")  # is imported, but not asked when a record names its type
    magic.__spec__ = importlib.machinery.ModuleSpec("magic", None)
    sys.modules["magic"] = magic
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline import dedup, filters, readers, writers
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.filters import (
        c4_filters,
        fineweb_quality_filter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
    from resiliparse.extract.html2text import extract_plain_text

    from lightning_lm.curation.terminal_punctuation import num_sentences

    for module in (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter):
        module.split_into_words = lambda text, language: text.split()
    minhash.load_word_tokenizer = lambda language: types.SimpleNamespace(word_tokenize=str.split)
    c4_filters.split_into_sentences = lambda text, language: range(num_sentences(text))

    class Extractor(PipelineStep):
        name = "resiliparse"

        def run(self, data, rank=0, world_size=1):
            for document in data:
                document.text = extract_plain_text(document.text, main_content=True)
                yield document

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def is_english(document) -> bool:
        start = max(len(document.text) - 4000, 0) // 2
        return identifier.classify(document.text[start : start + 4000])[0] == "en"

    off = {"filter_no_terminal_punct": False, "filter_curly_bracket": False, "filter_javascript": False}
    c4 = filters.C4QualityFilter(split_paragraph=True, min_words_per_line=-1, filter_policy=False, **off)
    pages, signatures, kept = (str(output / name) for name in ("pages", "signatures", "kept"))
    buckets, removed = str(output / "buckets"), str(output / "removed")
    config = minhash.MinhashConfig(num_buckets=16, hashes_per_bucket=8)
    stages = [
        [
            readers.WarcReader(str(archives)),
            Extractor(),
            filters.LambdaFilter(is_english),
            filters.GopherRepetitionFilter(),
            filters.GopherQualityFilter(),
            c4,
            filters.FineWebQualityFilter(),
            PIIFormatter(),
            writers.JsonlWriter(pages, compression=None),
        ],
        [readers.JsonlReader(pages), dedup.MinhashDedupSignature(signatures, config=config)],
        [dedup.MinhashDedupBuckets(signatures, buckets, config=config)],
        [dedup.MinhashDedupCluster(buckets, removed, config=config)],
        [readers.JsonlReader(pages), dedup.MinhashDedupFilter(removed), writers.JsonlWriter(kept, compression=None)],
    ]
    files = len(list(archives.iterdir()))
    for number, (stage, tasks) in enumerate(zip(stages, (files, files, 16, 1, files), strict=True)):
        log = str(output / f"log{number}")
        LocalPipelineExecutor(stage, tasks=tasks, workers=WORKERS, logging_dir=log, start_method="fork").run()
    return 0


LIBRARIES = {function.__name__: function for function in (ours, datatrove)}


def proportional_mb(group: int) -> float:
    """Return the PSS of all processes of a group, MB; one that ends while it is read counts nothing."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == group:
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total / 1024


def measure(name: str, archives: Path, folder: Path) -> dict[str, float]:
    """Return CPU-seconds, peak memory and wall time of a library in a process group of its own."""
    peak, ended = [0.0], threading.Event()
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--child", name, str(archives), str(folder / f"{name}-{archives.name}")]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def watch() -> None:
        while not ended.wait(0.2):
            peak[0] = max(peak[0], proportional_mb(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    assert child.returncode == 0, (folder / "log").read_text()[-3000:]
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "mb": peak[0], "s": time.perf_counter() - begin}


def main() -> None:
    from record import write_record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sizes", type=float, nargs="+", default=[50, 200, 800], metavar="MB")
    parser.add_argument("--beside", type=float, nargs="+", default=[200], metavar="MB", help="sizes for datatrove too")
    arguments = parser.parse_args()
    results: dict[str, float] = {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            archives = folder / f"{size:g}"
            archives.mkdir()
            for number in range(4):
                write_archive(archives / f"{number}.warc", size / 4, number)
            for name in ("datatrove", "ours") if size in arguments.beside else ("ours",):
                found = measure(name, archives, folder)
                results[f"{size:g} MB, {name}, CPU-s"] = round(found["cpu_s"], 1)
                results[f"{size:g} MB, {name}, peak MB"] = round(found["mb"])
            if size in arguments.beside:
                pair = [results[f"{size:g} MB, {name}, CPU-s"] for name in ("datatrove", "ours")]
                results[f"{size:g} MB, time, datatrove / ours"] = round(pair[0] / pair[1], 2)
                places = (folder / f"datatrove-{size:g}" / "kept", folder / f"ours-{size:g}")
                for name, place in zip(("datatrove", "ours"), places, strict=True):
                    lines = sum(path.read_bytes().count(b"\n") for path in place.glob("*.jsonl"))
                    results[f"{size:g} MB, {name}, documents kept"] = lines
        print(json.dumps(results, indent=2), flush=True)
        write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(LIBRARIES[sys.argv[2]](*map(Path, sys.argv[3:])))
    main()
