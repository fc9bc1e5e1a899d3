"""The verb ``lightning-lm word2vec``: vectors of words, their neighbours, and analogies."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lm.cli.numbers import COUNT, WHOLE
from lightning_lm.cli.tokenizer import INPUT_HELP, add_reading_arguments, source_of
from lightning_lm.errors import ConfigurationError, DataError, UsageError

if TYPE_CHECKING:
    from lightning_lm.models.word2vec import WordVectors

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    parser.add_argument("--input", nargs="+", metavar="PATH", help=INPUT_HELP)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="train vectors, and write them here")
    parser.add_argument("--vectors", type=Path, metavar="FOLDER", help="vectors that were written before, instead")
    parser.add_argument("--d-model", type=COUNT, default=100, metavar="N", help="features of a vector (%(default)s)")
    parser.add_argument("--window", type=COUNT, default=5, metavar="N", help="words to each side (%(default)s)")
    parser.add_argument("--min-count", type=COUNT, default=5, metavar="N", help="least occurrences (%(default)s)")
    parser.add_argument("--epochs", type=COUNT, default=5, metavar="N", help="passes over the text (%(default)s)")
    parser.add_argument("--seed", type=WHOLE, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--nearest", nargs="+", default=[], metavar="WORD", help="show the neighbours of words")
    parser.add_argument("--analogy", nargs=3, metavar=("MAN", "KING", "WOMAN"), help="show what completes an analogy")
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="count right analogies: four words a line, ':' begins a section",
    )
    add_reading_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    """Carry out the verb and return the exit status.

    Args:
        namespace: Parsed arguments of `add_arguments`.

    Raises:
        UsageError: If arguments are missing or do not fit together.
        LightningLMError: If the text or the vectors cannot be used.
    """
    from lightning_lm.models.word2vec import WordVectors

    if (namespace.vectors is None) == (namespace.output is None) or (namespace.output and not namespace.input):
        raise UsageError("lightning-lm word2vec needs --input and --output to train vectors, or --vectors FOLDER.")
    vectors = WordVectors.load(namespace.vectors) if namespace.output is None else _train(namespace)
    for word in namespace.nearest:
        print(f"{word}: " + ", ".join(f"{near} {cosine:.2f}" for near, cosine in vectors.nearest(word)))
    if namespace.analogy is not None:
        first, second, third = namespace.analogy
        found = ", ".join(f"{word} {cosine:.2f}" for word, cosine in vectors.analogy(first, second, third, 5))
        print(f"{second} - {first} + {third}: {found}")
    if namespace.questions is not None:
        right, asked, unknown = vectors.accuracy(_questions(namespace.questions))
        share = f" ({right / asked:.1%})" if asked else ""
        print(f"Analogies: {right:,} of {asked:,} right{share}, {unknown:,} with unknown words")
    return 0


def _train(namespace: argparse.Namespace) -> "WordVectors":
    from rich.console import Console
    from rich.progress import Progress

    from lightning_lm.models.word2vec import SkipGram

    output: Path = namespace.output
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"{output} is a file; --output names a folder.")
    if output.is_dir() and any(output.iterdir()) and not namespace.overwrite:
        raise ConfigurationError(f"{output} is not empty; choose another --output, or add --overwrite.")
    names = ("d_model", "window", "min_count", "epochs", "seed")
    settings = SkipGram(**{name: getattr(namespace, name) for name in names})
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Training vectors", total=1.0)
        texts = list(source_of(namespace).documents())
        vectors = settings.train(texts, advance=lambda part: progress.advance(task, part))
    vectors.save(output)
    print(f"{len(vectors.words):,} words of {namespace.d_model} features, written to {output}")
    return vectors


def _questions(path: Path) -> list[list[str]]:
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.lower().split()
        if not words or words[0].startswith(":"):
            continue
        if len(words) != 4:
            raise DataError(f"{path} line {number} has {len(words)} words; an analogy has four.")
        questions.append(words)
    return questions
