"""Rules, masks and exact lines of curation: MB/s of one core, rules beside datatrove's own filters.

    python tests/benchmarks/bench_curation_rules.py --output tests/benchmarks/results/curation_rules.json

400 documents of 5 kB: sentences of words after Zipf's law in lines and paragraphs, with a few numbers, bullets and
repeated lines. datatrove's filters get words between white space and our sentences, as ours do: its own tokenizers need
packages that it does not bring, and are slower. Both go through Gopher quality and repetition, C4 and FineWeb for every
document, whatever a rule before has decided. CPU-seconds; they take turns, the ratio is the median of rounds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from datatrove.data import Document as TheirDocument
from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter
from datatrove.pipeline.filters import gopher_repetition_filter as repetition_filter
from record import cpu_seconds, write_record

from lightning_lm.curation import (
    C4Quality,
    DuplicateLines,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    MaskPII,
    NormalizeText,
    as_document,
)
from lightning_lm.curation.terminal_punctuation import num_sentences

DOCUMENTS, CHARACTERS, ROUNDS = 400, 5000, 7


def texts() -> list[str]:
    random = np.random.default_rng(0)
    letters = list("etaoinshrdlcum")
    vocabulary = ["the", "of", "and", "to", "that", "have", "with", "be"]
    vocabulary += ["".join(random.choice(letters, random.integers(2, 10))) for _ in range(30_000)]
    found = []
    for _ in range(DOCUMENTS):
        lines: list[str] = []
        while sum(map(len, lines)) < CHARACTERS:
            if lines and random.random() < 0.03:
                lines.append(lines[random.integers(len(lines))])
                continue
            sentences = []
            for _ in range(random.integers(1, 6)):
                places = (len(vocabulary) ** random.random(random.integers(5, 25))).astype(int) - 1
                words = [vocabulary[place] for place in places]
                if random.random() < 0.1:
                    words.insert(1, str(random.integers(1, 3000)))
                sentences.append(" ".join(words).capitalize() + ".")
            lines.append(("- " if random.random() < 0.05 else "") + " ".join(sentences))
        found.append("\n\n".join(lines))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    corpus = texts()
    megabytes = sum(map(len, corpus)) / 1e6
    documents = [as_document(text) for text in corpus]
    rules = [GopherQuality(), GopherRepetition(), C4Quality(), FineWebQuality()]
    for module in (gopher_quality_filter, repetition_filter, fineweb_quality_filter):
        module.split_into_words = lambda text, language: text.split()
    c4_filters.split_into_sentences = lambda text, language: range(num_sentences(text))
    filters = [
        gopher_quality_filter.GopherQualityFilter(),
        repetition_filter.GopherRepetitionFilter(),
        c4_filters.C4QualityFilter(),
        fineweb_quality_filter.FineWebQualityFilter(),
    ]

    def each(steps, items):
        for item in items:
            for step in steps:
                step(item)

    works = {
        "all rules": lambda: each(rules, documents),
        "datatrove's filters": lambda: each(
            [one.filter for one in filters], [TheirDocument(text=text, id="") for text in corpus]
        ),
        **{type(rule).__name__: lambda rule=rule: each([rule], documents) for rule in rules},
        "MaskPII": lambda: each([MaskPII()], documents),
        "NormalizeText": lambda: each([NormalizeText()], documents),
        "DuplicateLines, summary and decision": lambda: DuplicateLines().decide(
            [DuplicateLines().summarize(documents)]
        ),
    }
    each(rules, documents[:20])  # tables of code points
    times = cpu_seconds(works, lambda name: works[name](), ROUNDS)
    results: dict[str, float] = {"MB": round(megabytes, 1)}
    results |= {f"{name}, MB/s": float(f"{megabytes / min(spent):.3g}") for name, spent in times.items()}
    ratios = [theirs / ours for ours, theirs in zip(times["all rules"], times["datatrove's filters"], strict=True)]
    results["datatrove's filters / all rules, time"] = round(statistics.median(ratios), 2)
    print(json.dumps(results, indent=2), time.process_time())
    write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    main()
