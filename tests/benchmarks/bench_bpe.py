"""Byte-pair encoding: training against Hugging Face `tokenizers`, encoding against tiktoken, on Python source text.

Runs take turns in one process on the same documents and cores. Training is compared by wall time (both use all cores),
encoding by CPU time on one thread. `rustbpe` is a second peer where it is installed.

    python tests/benchmarks/bench_bpe.py --output tests/benchmarks/results/bpe.json
"""

import argparse
import importlib.util
import os
import resource
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from record import write_record

from lightning_lm.tokenizers import BPETokenizer

END = "<|endoftext|>"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def python_sources(megabytes: float) -> list[str]:
    """Return Python files of the installed packages and the standard library, up to a size."""
    folders = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    documents, size = [], 0
    for path in (path for folder in folders for path in sorted(Path(folder).rglob("*.py"))):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if 200 < len(text) < 400_000:
            documents.append(text)
            size += len(text.encode())
        if size > megabytes * 1e6:
            return documents
    raise SystemExit(f"Only {size / 1e6:.0f} MB of Python source here; use --megabytes {int(size / 1e6)}.")


def train_ours(documents: list[str], vocab_size: int) -> None:
    BPETokenizer.train(documents, vocab_size, pattern="gpt2", show_progress=False)


def train_hugging_face(documents: list[str], vocab_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))


def train_rustbpe(documents: list[str], vocab_size: int) -> None:
    import rustbpe

    rustbpe.Tokenizer().train_from_iterator(iter(documents), vocab_size - 1, pattern=GPT2)


def seconds(function: Callable[[], object]) -> dict[str, float]:
    """Return wall time and CPU time of this process and the processes it started."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    function()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def take_turns(runs: dict[str, Callable[[], object]], rounds: int, clock: str) -> dict[str, object]:
    """Run all in turn, several times; report minima and the median ratio of ours to each peer, round by round."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
            sys.stderr.write(f"{name}: {taken[name][-1]}\n")
    best = {name: {key: round(min(t[key] for t in times), 3) for key in times[0]} for name, times in taken.items()}
    ratios = {
        name: round(statistics.median(a[clock] / b[clock] for a, b in zip(taken["ours"], times, strict=True)), 3)
        for name, times in taken.items()
        if name != "ours"
    }
    return {"best": best, f"median ratio of ours, {clock}": ratios}


def training(documents: list[str], vocab_size: int, rounds: int) -> dict[str, object]:
    trainers = {"ours": train_ours, "tokenizers": train_hugging_face}
    if importlib.util.find_spec("rustbpe"):
        trainers["rustbpe"] = train_rustbpe
    runs = {name: (lambda train=train: train(documents, vocab_size)) for name, train in trainers.items()}
    return take_turns(runs, rounds, "wall_s")


def encoding(documents: list[str], rounds: int) -> dict[str, object]:
    import tiktoken

    ours = BPETokenizer.train(documents, 8192, pattern="gpt2", show_progress=False)
    theirs = tiktoken.Encoding(
        "peer", pat_str=GPT2, mergeable_ranks=ours.vocabulary.ids, special_tokens=dict(ours.special_tokens)
    )
    sample = documents[:600]
    for text in sample:
        assert ours.encode(text) == theirs.encode_ordinary(text)
    runs = {
        "ours": lambda: [ours.encode(text) for text in sample],
        "tiktoken": lambda: [theirs.encode_ordinary(text) for text in sample],
    }
    result = take_turns(runs, 3 * rounds, "cpu_s")
    megabytes = sum(len(text.encode()) for text in sample) / 1e6
    best: dict[str, dict[str, float]] = result["best"]  # type: ignore[assignment]
    speeds = {name: round(megabytes / times["cpu_s"], 1) for name, times in best.items()}
    tokens = sum(len(ours.encode(text)) for text in sample)
    return {
        **result,
        "megabytes": round(megabytes, 1),
        "MB per CPU-s": speeds,
        "bytes per token": round(megabytes * 1e6 / tokens, 3),
    }


def small_corpus(documents: list[str]) -> dict[str, object]:
    """The task of CS336: 130 kB to a vocabulary of 500, wanted in under 0.4 s."""
    text = "".join(documents)[:130_000]
    return take_turns({"ours": lambda: BPETokenizer.train([text], 500, pattern="gpt2")}, 5, "wall_s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="tests/benchmarks/results/bpe.json")
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not importlib.util.find_spec("tokenizers"):
        raise SystemExit('The peer is missing: pip install "lightning-lm[dev]"')
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    documents = python_sources(arguments.megabytes)
    size = sum(len(text.encode()) for text in documents)
    results: dict[str, object] = {
        "corpus": f"{size} bytes of Python source in {len(documents)} documents, GPT-2 split pattern",
        "load average at the start": os.getloadavg(),
        "130 kB to 500 ids": small_corpus(documents),
        "encoding, 8192 ids": encoding(documents, arguments.rounds),
        "training, 8192 ids": training(documents, 8192, arguments.rounds),
        "training, 32768 ids": training(documents, 32768, max(1, arguments.rounds - 1)),
        "peak memory of this process, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
