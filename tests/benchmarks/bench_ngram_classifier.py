"""`NgramClassifier` in a Trainer beside fastText: training time of one core, and AUC on texts that neither has seen.

    pip install fasttext-numpy2-wheel
    python tests/benchmarks/bench_ngram_classifier.py --output tests/benchmarks/results/ngram_classifier.json

Texts are runs of 20 words of Python's standard library: those of the library against those of its tests, every tenth
file held out. Both have 16 features, word 1- and 2-grams in 262,144 buckets, one thread and 5 epochs, and begin with
the texts: hashing is part of the time, importing is not. Rounds take turns; fastText has the best of three rates.
"""

import argparse
import logging
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import fasttext
import numpy as np
import torch
from lightning.pytorch import Trainer
from record import write_record

from lightning_lm.curation.ngram_features import ngram_batch, ngram_features
from lightning_lm.datamodules import QualityDataModule
from lightning_lm.models import NgramClassifier
from lightning_lm.modules import ClassificationModule
from lightning_lm.optim import AdamW, Linear

WORDS, EPOCHS, BUCKETS, FEATURES, ROUNDS = 20, 5, 1 << 18, 16, 2
RATES = (0.05, 0.1, 0.2)
Texts = tuple[list[str], list[str]]


def texts() -> tuple[Texts, Texts]:
    """Return texts of tests and of the library, to train on and held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = ([], []), ([], [])
    for index, path in enumerate(sorted(library.rglob("*.py"))):
        parts = path.relative_to(library).parts
        if "site-packages" in parts or parts[0] in ("lib2to3", "idlelib"):
            continue
        label = int(not any(part in ("test", "tests") for part in parts))
        words = path.read_text(encoding="utf-8", errors="replace").split()
        side = held_out if index % 10 == 0 else train
        side[label].extend(" ".join(words[start : start + WORDS]) for start in range(0, len(words) - WORDS, WORDS))
    return train, held_out


def ours(train: Texts) -> NgramClassifier:
    torch.manual_seed(0)
    model = NgramClassifier(buckets=BUCKETS, d_model=FEATURES, max_ngram=2)
    optimizer = AdamW(lr=0.02, betas=(0.9, 0.99), weight_decay=0.0)
    module = ClassificationModule(model, labels=["other", "good"], optimizer=optimizer, schedule=Linear(final=0.0))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", **quiet)
    trainer.fit(module, datamodule=QualityDataModule(train[1], train[0], validation=0.0))
    return model.eval()


def theirs(train: Texts, rate: float) -> object:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        lines = [f"__label__{label} {text}\n" for label, side in enumerate(train) for text in side]
        file.writelines(lines[place] for place in np.random.default_rng(0).permutation(len(lines)))
        file.flush()
        settings = {"dim": FEATURES, "wordNgrams": 2, "bucket": BUCKETS, "epoch": EPOCHS, "lr": rate, "minCount": 1}
        return fasttext.train_supervised(file.name, thread=1, verbose=0, **settings)


def auc(scores: list[np.ndarray]) -> float:
    """Return the probability that a text of the library scores higher than one of the tests."""
    other, good = scores
    ranks = np.argsort(np.argsort(np.concatenate([other, good]))) + 1
    return float((ranks[len(other) :].sum() - len(good) * (len(good) + 1) / 2) / (len(other) * len(good)))


@torch.inference_mode()
def our_scores(model: NgramClassifier, side: list[str]) -> np.ndarray:
    logits = model(**ngram_batch([ngram_features(text, 2) for text in side]))
    return (logits[:, 1] - logits[:, 0]).numpy()


def their_scores(model: object, side: list[str]) -> np.ndarray:
    labels, chances = model.predict(side, k=2)
    return np.array([p[list(names).index("__label__1")] for names, p in zip(labels, chances, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    train, held_out = texts()
    works = {"lightning-lm": lambda: ours(train)}
    works |= {f"fastText, rate {rate}": lambda rate=rate: theirs(train, rate) for rate in RATES}
    times, areas = {name: [] for name in works}, {}
    for _ in range(ROUNDS):
        for name, run in works.items():
            start = time.process_time()
            model = run()
            times[name].append(time.process_time() - start)
            score = our_scores if name == "lightning-lm" else their_scores
            areas[name] = auc([score(model, side) for side in held_out])
    best = max((name for name in works if name != "lightning-lm"), key=areas.__getitem__)
    results = {
        "texts to train on, tests and library": [len(side) for side in train],
        "texts held out": [len(side) for side in held_out],
        "MB to train on": round(sum(len(text) for side in train for text in side) / 1e6, 1),
        "CPU-seconds": {name: [round(value, 2) for value in found] for name, found in times.items()},
        "AUC": {name: round(area, 4) for name, area in areas.items()},
        "time, ours to the best of theirs": round(
            statistics.median(a / b for a, b in zip(times["lightning-lm"], times[best], strict=True)), 3
        ),
        "AUC, ours minus the best of theirs": round(areas["lightning-lm"] - areas[best], 4),
    }
    print(results)
    write_record(
        arguments.output,
        command=f"python tests/benchmarks/bench_ngram_classifier.py --output {arguments.output}",
        results=results,
    )


if __name__ == "__main__":
    main()
