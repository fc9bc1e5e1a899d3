"""The verb ``lightning-lm tokenizer``: train a tokenizer, compare several."""

import argparse
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.cli.numbers import COUNT, POSITIVE, Number
from lightning_lm.errors import LightningLMError, TokenizerError
from lightning_lm.parts import Limit
from lightning_lm.storage import held

if TYPE_CHECKING:
    from lightning_lm.data import Source
    from lightning_lm.tokenizers.base import BaseTokenizer

__all__ = ["INPUT_HELP", "STANDARD_LIBRARY", "add_arguments", "add_reading_arguments", "run", "source_of"]

_END_OF_TEXT = "<|endoftext|>"
STANDARD_LIBRARY = "standard-library"
"""Name, as input of a verb, of the sources on which `fit` trains by default."""
INPUT_HELP = (
    "files or folders, read as `fit` reads them (text, JSON, CSV, Parquet, Arrow; compressed too); "
    f"{STANDARD_LIBRARY} for Python's own sources, on which `fit` trains by default"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    verbs = parser.add_subparsers(dest="tokenizer_verb", required=True, metavar="{train,compare}")
    train = verbs.add_parser("train", help="train a tokenizer on text files")
    train.add_argument("--input", nargs="+", required=True, metavar="PATH", help=INPUT_HELP)
    train.add_argument("--output", required=True, metavar="FOLDER", help="where the tokenizer is written")
    train.add_argument("--vocab-size", type=COUNT, default=8192, help="number of ids (default: %(default)s)")
    train.add_argument("--kind", choices=sorted(_TRAINERS), default="bpe", help="default: %(default)s")
    train.add_argument("--pattern", default="gpt4", help="gpt2, gpt4, qwen2 or an expression (default: %(default)s)")
    train.add_argument(
        "--special-token", nargs="*", default=[_END_OF_TEXT], metavar="NAME", help="tokens that split the text"
    )
    train.add_argument("--num-workers", type=COUNT, help="processes (default: one a CPU core)")
    train.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    train.add_argument(
        "--hold-out",
        type=Number(Limit.BELOW_ONE),
        default=0.0,
        metavar="X",
        help="fraction of the documents that `fit` validates on",
    )
    compare = verbs.add_parser("compare", help="print what tokenizers make of a text, as a table")
    compare.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help='folders, files, or "bytes"')
    compare.add_argument(
        "--input", action="append", required=True, metavar="PATH", help=f"{INPUT_HELP}; may be repeated"
    )
    compare.add_argument("--max-megabytes", type=POSITIVE, default=10.0, help="text to read (default: %(default)s)")
    for verb in (train, compare):
        add_reading_arguments(verb)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how text is read from the paths of ``--input``.

    Args:
        parser: Parser of a verb.
    """
    parser.add_argument("--field", default="text", help="the field of a record (default: %(default)s)")
    parser.add_argument("--encoding", metavar="NAME", help="encoding of text files that are not UTF-8")
    parser.add_argument("--on-bad-record", choices=("raise", "skip"), default="raise", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the verb and return the exit status; what a user can mend is said in one line on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status = _run(arguments)
    for warning in caught:
        sys.stderr.write(f"lightning-lm tokenizer: {warning.message}\n")
    return status


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.tokenizer_verb == "train":
            _train(arguments)
        else:
            _compare(arguments)
    except LightningLMError as error:
        sys.stderr.write(f"lightning-lm tokenizer: {error}\n")
        return 1
    return 0


def _train(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise TokenizerError(f"{output} is a file; --output names a folder.")
    if output.is_dir() and any(output.iterdir()) and not arguments.overwrite:
        raise TokenizerError(f"{output} is not empty; choose another --output, or add --overwrite.")
    with held(output, "choose another --output"):
        documents = _Counted(_training_documents(arguments))
        tokenizer = _TRAINERS[arguments.kind](documents, arguments)
        tokenizer.save(output)
    sys.stdout.write(f"{tokenizer.vocab_size:,} tokens from {documents.count:,} documents, written to {output}\n")


class _Counted:
    """Documents, read once and counted."""

    def __init__(self, documents: Iterator[str]) -> None:
        self._documents = documents
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            self.count += 1
            yield document


def _training_documents(arguments: argparse.Namespace) -> Iterator[str]:
    """Return the documents without those that `fit` holds out: a tokenizer must not have seen them."""
    from lightning_lm.data import hold_out

    source = source_of(arguments)
    return (hold_out(source, arguments.hold_out)[0] if arguments.hold_out else source).documents()


def _documents(arguments: argparse.Namespace) -> Iterator[str]:
    return source_of(arguments).documents()


def source_of(arguments: argparse.Namespace) -> "Source":
    """Return what `fit` would read from the same paths.

    Args:
        arguments: Parsed arguments of `add_reading_arguments`, and ``input``.
    """
    from lightning_lm.data import Files, StandardLibrary

    if list(arguments.input) == [STANDARD_LIBRARY]:
        return StandardLibrary()
    return Files(
        path=tuple(arguments.input),
        field=arguments.field,
        encoding=arguments.encoding,
        on_bad_record=arguments.on_bad_record,
    )


def _train_bpe(texts: Iterable[str], arguments: argparse.Namespace) -> "BaseTokenizer":
    from lightning_lm.tokenizers.bpe import BPETokenizer

    return BPETokenizer.train(texts, arguments.vocab_size, **_word_settings(arguments))


def _train_words(texts: Iterable[str], arguments: argparse.Namespace) -> "BaseTokenizer":
    from lightning_lm.tokenizers.simple import WordTokenizer

    return WordTokenizer.train(texts, arguments.vocab_size, **_word_settings(arguments))


def _train_characters(texts: Iterable[str], arguments: argparse.Namespace) -> "BaseTokenizer":
    from lightning_lm.tokenizers.simple import CharacterTokenizer

    return CharacterTokenizer.train(texts, special_tokens=arguments.special_token)


def _train_sentencepiece(texts: Iterable[str], arguments: argparse.Namespace) -> "BaseTokenizer":
    from lightning_lm.tokenizers.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer.train(
        texts,
        arguments.vocab_size,
        model_type=arguments.kind.removeprefix("sentencepiece-"),
        special_tokens=arguments.special_token,
        num_workers=arguments.num_workers,
    )


_TRAINERS = {
    "bpe": _train_bpe,
    "words": _train_words,
    "characters": _train_characters,
    "sentencepiece-bpe": _train_sentencepiece,
    "sentencepiece-unigram": _train_sentencepiece,
}


def _word_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "special_tokens": arguments.special_token,
        "pattern": arguments.pattern,
        "num_workers": arguments.num_workers,
    }


def _compare(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from lightning_lm.tokenizers.comparison import comparison_table, take_sample
    from lightning_lm.tokenizers.loading import load_tokenizer
    from lightning_lm.tokenizers.simple import ByteTokenizer

    sample = take_sample(_documents(arguments), max_bytes=int(arguments.max_megabytes * 1e6))
    tokenizers = {name: ByteTokenizer() if name == "bytes" else load_tokenizer(name) for name in arguments.tokenizers}
    Console().print(comparison_table(tokenizers, sample))
