"""Interpolated Kneser-Ney beside nltk, and KenLM on our ARPA file: time, bits per byte, and whether it sums to one.

Text: the sources of Python's standard library on this machine, as bytes. nltk has one discount (its default is 0.1)
and keeps every count in dictionaries; it is asked for a sample of the held-out bytes, since one probability takes
milliseconds. KenLM reads the file and scores the same documents, a word a byte, at float32.

    python tests/benchmarks/bench_ngram.py            # pip install nltk==3.10.4 kenlm==0.3.0
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import kenlm
import numpy as np
from nltk.lm import KneserNeyInterpolated
from nltk.util import everygrams
from record import write_record

from lightning_lm.data import StandardLibrary, hold_out
from lightning_lm.evals.ngram import token_words
from lightning_lm.models import fit_ngram, write_arpa
from lightning_lm.tokenizers import ByteTokenizer

RECORD = Path(__file__).parent / "results" / "ngram.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=300_000, help="training text that nltk is given too")
    parser.add_argument("--large", type=int, default=4_000_000, help="training text of the larger fit")
    parser.add_argument("--asked", type=int, default=300, help="probabilities that nltk is asked for")
    parser.add_argument("--order", type=int, default=5)
    settings = parser.parse_args()
    train, held_out = (side.documents() for side in hold_out(StandardLibrary(), 0.05))
    tokenizer = ByteTokenizer()
    large = documents_of(train, settings.large, tokenizer)
    small, size = [], 0
    for document in large:
        if size < settings.bytes:
            small.append(document[: settings.bytes - size])
            size += len(document)
    text = documents_of(held_out, 100_000, tokenizer)
    results = {"order": settings.order, "large_fit": fit(large, text, settings.order, tokenizer)[1]}
    model, results["ours"] = fit(small, text, settings.order, tokenizer)
    results["kenlm"] = kenlm_scores(model, text, tokenizer)
    results["nltk"] = nltk_scores(small, text, settings)
    results["fit_ratio"] = results["nltk"]["fit_cpu_s"] / results["ours"]["fit_cpu_s"]
    results["query_ratio"] = results["nltk"]["cpu_s_per_probability"] / results["ours"]["cpu_s_per_probability"]
    write_record(
        RECORD, command=" ".join(["python", "tests/benchmarks/bench_ngram.py", *sys.argv[1:]]), results=results
    )
    print(results)


def documents_of(texts, most, tokenizer):
    documents, size = [], 0
    for document in texts:
        ids = np.append(tokenizer.encode_batch([document])[0].astype(np.int64), tokenizer.eos_id)
        documents.append(ids)
        size += len(ids)
        if size >= most:
            break
    return documents


def joined(documents):
    return np.concatenate(documents), np.cumsum([len(ids) for ids in documents])


def fit(documents, text, order, tokenizer):
    start = time.process_time()
    model = fit_ngram([joined(documents)], order=order, vocab_size=tokenizer.vocab_size)
    fitted = time.process_time()
    logs = model.log_probs(*joined(text))
    asked = time.process_time()
    context = text[0][:50]
    return model, {
        "train_tokens": sum(map(len, documents)),
        "held_out_tokens": len(logs),
        "num_ngrams": sum(model.num_ngrams),
        "fit_cpu_s": fitted - start,
        "cpu_s_per_probability": (asked - fitted) / len(logs),
        "bits_per_token": -float(logs.mean()) / math.log(2),
        "sum_of_probabilities": float(np.exp(model.next_log_probs(context.tolist())).sum()),
    }


def kenlm_scores(model, text, tokenizer):
    words = token_words(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        write_arpa(model, Path(folder) / "model.arpa", words)
        other = kenlm.Model(str(Path(folder) / "model.arpa"))
        difference, total, count = 0.0, 0.0, 0
        for ids in text:
            sentence = " ".join(words[token] for token in ids[:-1])
            theirs = [log10 * math.log(10) for log10, _, _ in other.full_scores(sentence)]  # with </s>
            ours = model.log_probs(ids)
            difference = max(difference, float(np.abs(np.array(theirs) - ours).max()))
            total, count = total - sum(theirs), count + len(theirs)
    return {"bits_per_token": total / count / math.log(2), "largest_difference_nats": difference}


def nltk_scores(documents, text, settings):
    order = settings.order
    padded = [["<s>"] * (order - 1) + [*map(str, ids)] for ids in documents]
    start = time.process_time()
    model = KneserNeyInterpolated(order, discount=0.75)
    model.fit(
        (everygrams(symbols, max_len=order) for symbols in padded), [symbol for symbols in padded for symbol in symbols]
    )
    fitted = time.process_time()
    symbols = ["<s>"] * (order - 1) + [*map(str, text[0])]
    steps = np.linspace(order - 1, len(symbols) - 1, settings.asked).astype(int)
    scores = [model.score(symbols[step], symbols[step - order + 1 : step]) for step in steps]
    asked = time.process_time()
    context = symbols[order + 20 : 2 * order + 19]
    known = [score for score in scores if score > 0]
    return {
        "discount": 0.75,
        "fit_cpu_s": fitted - start,
        "asked": settings.asked,
        "cpu_s_per_probability": (asked - fitted) / settings.asked,
        "probabilities_of_zero": len(scores) - len(known),
        "bits_per_token_where_positive": -sum(map(math.log2, known)) / max(len(known), 1),
        "sum_of_probabilities_without_start": sum(model.score(str(symbol), context) for symbol in range(257)),
    }


if __name__ == "__main__":
    main()
