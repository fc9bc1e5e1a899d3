"""The verb ``lightning-lm ngram``: a Kneser-Ney n-gram model, beside any other model on the same bytes."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lm.cli.generate import LoadModel
from lightning_lm.cli.numbers import COUNT, WHOLE, Number
from lightning_lm.cli.tokenizer import INPUT_HELP, add_reading_arguments, source_of
from lightning_lm.errors import ConfigurationError, UsageError
from lightning_lm.parts import Limit
from lightning_lm.storage import held

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_lm.data import Source
    from lightning_lm.models.ngram import NgramModel
    from lightning_lm.tokenizers.base import BaseTokenizer

__all__ = ["add_arguments", "run"]

_LONGEST_TEXT = 32_000_000
"""Bytes that xz compresses in about half a minute."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    parser.add_argument("--input", nargs="+", metavar="PATH", help=INPUT_HELP)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="fit a model, and write it here")
    parser.add_argument("--order", type=COUNT, default=5, metavar="N", help="tokens of an n-gram (%(default)s)")
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="T", help="bytes, words, or a tokenizer's folder or file (%(default)s)"
    )
    parser.add_argument("--vocab-size", type=COUNT, default=50_000, metavar="N", help="of words (%(default)s)")
    parser.add_argument(
        "--hold-out",
        type=Number(Limit.BELOW_ONE),
        default=0.05,
        metavar="X",
        help="fraction of the documents to measure on, the one that `fit` holds out (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model that was written before, instead")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="measure this model on the same text too")
    parser.add_argument("--arpa", type=Path, metavar="FILE", help="write the model for KenLM and others")
    parser.add_argument("--sample", type=COUNT, metavar="N", help="draw N tokens from the model")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="beginning of the sample")
    parser.add_argument("--seed", type=WHOLE, default=0, metavar="N", help="of the sample (%(default)s)")
    add_reading_arguments(parser)


def run(namespace: argparse.Namespace, load_model: LoadModel) -> int:
    """Carry out the verb and return the exit status.

    Args:
        namespace: Parsed arguments of `add_arguments`.
        load_model: Opens a checkpoint.

    Raises:
        UsageError: If arguments are missing or do not fit together.
        LightningLMError: If the text or a model cannot be used.
    """
    if (namespace.model is None) == (namespace.output is None) or (namespace.output and not namespace.input):
        raise UsageError(
            "lightning-lm ngram needs --input and --output to fit a model, or --model FOLDER of one that was fitted, "
            "with --input to measure it."
        )
    if namespace.output is not None:
        model, tokenizer, texts = _fit(namespace)
    else:
        model, tokenizer = _load(namespace.model)
        texts = source_of(namespace) if namespace.input else None
    if namespace.arpa is not None:
        _write_arpa(model, tokenizer, namespace.arpa)
    if texts is not None:
        _measure(model, tokenizer, texts, namespace.checkpoint, load_model)
    if namespace.sample is not None:
        prompt = tokenizer.encode(namespace.prompt)
        ids = model.sample(prompt, max_tokens=namespace.sample, seed=namespace.seed, eos_id=tokenizer.eos_id)
        ids = ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids
        print(f"\n{tokenizer.decode([*prompt, *ids])}")
    return 0


def _fit(namespace: argparse.Namespace) -> "tuple[NgramModel, BaseTokenizer, Source | None]":
    from lightning_lm.data import hold_out, tokenize
    from lightning_lm.models.ngram import Workspace, fit_ngram, load_ngram, save_ngram

    output: Path = namespace.output
    if output.is_dir() and any(output.iterdir()) and not namespace.overwrite:
        raise ConfigurationError(f"{output} is not empty; choose another --output, or add --overwrite.")
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"{output} is a file; --output names a folder.")
    source = source_of(namespace)
    train, held_out = hold_out(source, namespace.hold_out) if namespace.hold_out else (source, None)
    tokenizer = _tokenizer(namespace, train)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with (
        held(output, "choose another --output"),
        tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as folder,
    ):
        store = tokenize(train, tokenizer, Path(folder) / "tokens", show_progress=sys.stderr.isatty())
        total = namespace.order * (store.num_tokens + len(store))
        with _progress("Counting n-grams", total) as advance:
            model = fit_ngram(
                [(store.tokens, store.ends)],
                order=namespace.order,
                vocab_size=tokenizer.vocab_size,
                workspace=Workspace(Path(folder)),
                advance=advance,
            )
        save_ngram(model, output, files=tokenizer.to_files())
        print(
            f"{namespace.order}-gram model of {store.num_tokens:,} tokens in {len(store):,} documents: "
            f"{sum(model.num_ngrams):,} n-grams, written to {output}"
        )
        del model, store
    return load_ngram(output), tokenizer, held_out


def _tokenizer(namespace: argparse.Namespace, train: "Source") -> "BaseTokenizer":
    from lightning_lm.tokenizers import ByteTokenizer, WordTokenizer, load_tokenizer

    if namespace.tokenizer == "bytes":
        return ByteTokenizer()
    if namespace.tokenizer == "words":
        return WordTokenizer.train(train.documents(), namespace.vocab_size)
    return load_tokenizer(namespace.tokenizer)


def _load(folder: Path) -> "tuple[NgramModel, BaseTokenizer]":
    from lightning_lm.models.ngram import load_ngram
    from lightning_lm.tokenizers import load_tokenizer

    return load_ngram(folder), load_tokenizer(folder)


def _write_arpa(model: "NgramModel", tokenizer: "BaseTokenizer", path: Path) -> None:
    from lightning_lm.evals.ngram import token_words
    from lightning_lm.models.ngram import write_arpa

    with _progress("Writing the ARPA file", sum(model.num_ngrams)) as advance:
        write_arpa(model, path, token_words(tokenizer), advance=advance)
    print(f"ARPA file: {path}")


def _measure(
    model: "NgramModel", tokenizer: "BaseTokenizer", source: "Source", checkpoint: Path | None, load_model: LoadModel
) -> None:
    from rich.console import Console

    from lightning_lm.evals.compression import compression_table, gzip_bits_per_byte, xz_bits_per_byte
    from lightning_lm.evals.ngram import evaluate_ngram

    texts = [text for text in source.documents() if text]
    score = evaluate_ngram(model, texts, tokenizer)
    name = f"{model.order}-gram, Kneser-Ney"
    values = {name: score.bits_per_byte}
    data = "".join(texts).encode()
    if len(data) <= _LONGEST_TEXT:
        values.update({"gzip -9": gzip_bits_per_byte(data), "xz -9": xz_bits_per_byte(data)})
    if checkpoint is not None:
        values[str(checkpoint)] = _bits_per_byte(checkpoint, texts, len(data), load_model)
    print(
        f"Measured on {len(texts):,} documents, {score.num_tokens:,} tokens with their ends: "
        f"perplexity {score.perplexity:.4g} per token, {score.bits_per_byte:.4f} bits per byte"
    )
    title = f"Bits per byte of the same text ({len(data):,} bytes), less is better"
    Console(width=None if sys.stdout.isatty() else 80).print(compression_table(values, title, ours=name))


def _bits_per_byte(checkpoint: Path, texts: list[str], num_bytes: int, load_model: LoadModel) -> float:
    """Return the bits per byte of another language model, each token in windows of its context."""
    import math

    from lightning_lm.evals import LocalModel, RollingLikelihood
    from lightning_lm.storage import resolve_checkpoint

    other, tokenizer = load_model(resolve_checkpoint(checkpoint))
    if tokenizer is None:
        raise ConfigurationError(f"{checkpoint} holds no tokenizer, so bits per byte cannot be measured.")
    scores = LocalModel(other, tokenizer).log_likelihoods([RollingLikelihood(text) for text in texts])
    return -sum(score.logprob for score in scores) / math.log(2.0) / num_bytes


@contextmanager
def _progress(title: str, total: int) -> "Iterator[Callable[[int], None]]":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=total)
        yield lambda size: progress.advance(task, size)
