"""Small files in exactly the published formats, and models to answer them."""

import csv
import gzip
import json

from lightning_lm.evals import Completions, LogLikelihood


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_table(path, records):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


class Uniform:
    """Finds every text equally likely."""

    def log_likelihoods(self, requests):
        return [LogLikelihood(logprob=-1.0, num_tokens=1) for _ in requests]


class Oracle:
    """Knows what to say: a function of the prompt's text."""

    def __init__(self, says):
        self.says = says

    def generate(self, requests):
        texts = [self.says(request.prompt.text) for request in requests]
        texts = [
            text if isinstance(text, list) else [text] * request.num_samples
            for text, request in zip(texts, requests, strict=True)
        ]
        return [Completions(texts=tuple(each), num_tokens=tuple(map(len, each))) for each in texts]


def score(task, model):
    scores = []
    for item in task.items():
        ask = getattr(model, "log_likelihoods", None) or model.generate
        scores.append(task.score(item, ask(item.requests)))
    return task.aggregate(scores)
