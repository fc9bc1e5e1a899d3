"""Near-duplicates by MinHash beside rensa and datasketch: CPU-seconds, memory, recall and precision of one run.

    python tests/benchmarks/bench_near_duplicates.py --output tests/benchmarks/results/near_duplicates.json

All read the same file of 94 MB: 18,000 documents of words after Zipf's law, a fifth of them copies of another with
words exchanged. All use word 5-grams, 128 permutations and 16 bands of 8, and make clusters of pairs with a Jaccard
index of at least 0.8; the peers estimate it from signatures, we compute it, and keep the shingles for that on disk, as
a pipeline does. Each runs in a process of its own, in turn. True pairs are those of one origin whose sets of 5-grams
have such an index.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np

DOCUMENTS, WORDS, SIMILARITY, ROUNDS = 18_000, 850, 0.8, 2
PERMUTATIONS, BANDS, NGRAM, SHARD = 128, 16, 5, 2000


def write_corpus(path: Path) -> None:
    """Write one document a line, with the number of its origin."""
    random = np.random.default_rng(0)
    vocabulary = np.array(
        ["".join(random.choice(list("etaoinshrdlcum"), random.integers(2, 9))) for _ in range(50_000)]
    )

    def draw(count: int) -> np.ndarray:
        return (50_000 ** random.random(count)).astype(int) - 1

    originals: list[np.ndarray] = []
    with path.open("w") as file:
        for _ in range(DOCUMENTS):
            if originals and random.random() < 0.2:
                origin = int(random.integers(len(originals)))
                words = originals[origin].copy()
                places = random.integers(0, len(words), random.integers(0, max(len(words) // 20, 1)))
                words[places] = draw(len(places))
            else:
                origin, words = len(originals), draw(int(random.integers(WORDS // 4, WORDS * 7 // 4)))
                originals.append(words)
            file.write(f"{origin}\t{' '.join(vocabulary[words])}\n")


def read(path: str):
    with open(path) as file:
        for line in file:
            yield line.rstrip("\n").partition("\t")[2]


def grams(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[start : start + NGRAM]) for start in range(max(len(words) - NGRAM + 1, 1))]


def ours(path: str) -> list[tuple[int, int]]:
    from lightning_lm.curation import Document, NearDuplicates
    from lightning_lm.curation.execution.arrays import LazyArrays, write_arrays

    step = NearDuplicates(similarity=SIMILARITY, ngram=NGRAM, bands=BANDS, rows=PERMUTATIONS // BANDS)
    folder, summaries, shard = Path(path).with_suffix(".summaries"), [], []
    folder.mkdir(exist_ok=True)

    def summarize() -> None:
        write_arrays(folder / f"{len(summaries)}.npz", step.summarize(shard))
        summaries.append(LazyArrays(folder / f"{len(summaries)}.npz"))

    for number, text in enumerate(read(path)):
        shard.append(Document(f"{number:08}", text))
        if len(shard) == SHARD:
            summarize()
            shard = []
    summarize()
    decision = step.decide(summaries)
    return [(int(kept), int(removed)) for kept, removed in zip(decision["kept"], decision["removed"], strict=True)]


def rensa(path: str) -> list[tuple[int, int]]:
    from rensa import RMinHash, RMinHashLSH

    lsh, signatures = RMinHashLSH(SIMILARITY, PERMUTATIONS, BANDS), []
    for number, text in enumerate(read(path)):
        signature = RMinHash(PERMUTATIONS, 42)
        signature.update(grams(text))
        lsh.insert(number, signature)
        signatures.append(signature)
    return [
        (number, other)
        for number, signature in enumerate(signatures)
        for other in lsh.query(signature)
        if other > number and signature.jaccard(signatures[other]) >= SIMILARITY
    ]


def datasketch(path: str) -> list[tuple[int, int]]:
    from datasketch import MinHash, MinHashLSH

    lsh, signatures = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS)), []
    for number, text in enumerate(read(path)):
        signature = MinHash(PERMUTATIONS)
        signature.update_batch([gram.encode() for gram in grams(text)])
        lsh.insert(number, signature)
        signatures.append(signature)
    return [
        (number, other)
        for number, signature in enumerate(signatures)
        for other in lsh.query(signature)
        if other > number and signature.jaccard(signatures[other]) >= SIMILARITY
    ]


LIBRARIES = {function.__name__: function for function in (ours, rensa, datasketch)}


def child(name: str, path: str) -> None:
    pairs = LIBRARIES[name](path)
    peak = next(
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    print(json.dumps({"seconds": time.process_time(), "mb": int(peak) / 1024, "pairs": pairs}))


def true_pairs(path: Path) -> set[tuple[int, int]]:
    groups: dict[str, list[tuple[int, set[str]]]] = {}
    for number, line in enumerate(path.open()):
        origin, _, text = line.rstrip("\n").partition("\t")
        groups.setdefault(origin, []).append((number, text))
    found = set()
    for group in groups.values():
        sets = [(number, set(grams(text))) for number, text in group] if len(group) > 1 else []
        for (one, first), (other, second) in combinations(sets, 2):
            if len(first & second) >= SIMILARITY * len(first | second):
                found.add((one, other))
    return found


def quality(pairs: list[tuple[int, int]], truth: set[tuple[int, int]]) -> dict[str, float]:
    """Return recall and precision of pairs in one cluster, and the documents that are kept, one of each cluster."""
    clusters, expected = closed(pairs), closed(truth)
    return {
        "recall": len(clusters & expected) / len(expected),
        "precision": len(clusters & expected) / max(len(clusters), 1),
        "kept": DOCUMENTS - len({other for _, other in clusters}),
    }


def closed(pairs) -> set[tuple[int, int]]:
    from lightning_lm.curation.components import Components

    components = Components(DOCUMENTS)
    for one, other in pairs:
        components.join(one, other)
    return {pair for group in components.groups() for pair in combinations(group.tolist(), 2)}


def main() -> None:
    from record import write_record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.tsv"
        write_corpus(path)
        truth, megabytes = true_pairs(path), path.stat().st_size / 1e6
        runs: dict[str, list[dict]] = {name: [] for name in LIBRARIES}
        for index in range(ROUNDS):
            for name in runs if index % 2 else reversed(runs):
                if name != "datasketch" or index < 1:
                    command = [sys.executable, __file__, "--child", name, str(path)]
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                    runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    results: dict[str, object] = {"MB": round(megabytes, 1), "true pairs": len(truth)}
    for name, rounds in runs.items():
        results[f"{name}, s"] = round(min(run["seconds"] for run in rounds), 2)
        results[f"{name}, MB/s"] = round(megabytes / min(run["seconds"] for run in rounds), 1)
        results[f"{name}, peak MB"] = round(max(run["mb"] for run in rounds))
        results |= {f"{name}, {key}": round(value, 4) for key, value in quality(rounds[0]["pairs"], truth).items()}
    for peer in ("rensa", "datasketch"):
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(runs["ours"], runs[peer], strict=False)]
        results[f"time, ours / {peer}"] = round(statistics.median(ratios), 3)
        results[f"memory, ours / {peer}"] = round(results["ours, peak MB"] / results[f"{peer}, peak MB"], 3)
    print(json.dumps(results, indent=2))
    write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
