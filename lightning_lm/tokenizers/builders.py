"""Tokenizers as parts, to be named in YAML."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from lightning_lm.errors import CheckpointError, TokenizerError
from lightning_lm.parts import Limit, Part
from lightning_lm.tokenizers.base import END_OF_TEXT, MARKER, BaseTokenizer
from lightning_lm.tokenizers.bpe import BPETokenizer
from lightning_lm.tokenizers.loading import load_tokenizer
from lightning_lm.tokenizers.sentencepiece import SentencePieceTokenizer
from lightning_lm.tokenizers.simple import ByteTokenizer, CharacterTokenizer, WordTokenizer

__all__ = [
    "Bytes",
    "LoadTokenizer",
    "TokenizerPart",
    "TrainBPE",
    "TrainCharacters",
    "TrainSentencePiece",
    "TrainWords",
    "TrainedTokenizerPart",
]

Texts = Callable[[], Iterable[str]]

_TRAINERS_VERSION = 1
"""Version of the training algorithm, incremented when the same texts give other ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerPart(Part):
    """Base of all parts that make a tokenizer."""

    def build(self, texts: Texts, cache_dir: Path | str | None = None) -> BaseTokenizer:
        """Return the tokenizer.

        Args:
            texts: Returns the training documents; may be called twice.
            cache_dir: Folder that keeps a trained tokenizer for the next run with the same part and texts.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedTokenizerPart(TokenizerPart):
    """Base of the parts that train; they do so once for the same settings and texts."""

    def build(self, texts: Texts, cache_dir: Path | str | None = None) -> BaseTokenizer:
        """Return the tokenizer, from the cache if possible."""
        if cache_dir is None:
            return self.train(texts())
        folder = Path(cache_dir) / f"tokenizer-{self._key(texts())}"
        if (folder / MARKER).is_file():
            try:
                return load_tokenizer(folder)
            except (TokenizerError, CheckpointError):
                # Damaged by someone else; training again repairs it.
                pass
        tokenizer = self.train(texts())
        tokenizer.save(folder)
        return tokenizer

    def train(self, texts: Iterable[str]) -> BaseTokenizer:
        """Train on documents."""
        raise NotImplementedError

    def _key(self, texts: Iterable[str]) -> str:
        digest = hashlib.sha256(json.dumps([_TRAINERS_VERSION, self.to_dict()], sort_keys=True).encode())
        for text in texts:
            content = text.encode("utf-8", errors="surrogatepass")
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBPE(TrainedTokenizerPart, limits={"vocab_size": Limit.COUNT, "num_workers": Limit.COUNT}):
    """Train byte-level byte-pair encoding; see `BPETokenizer.train`.

    Args:
        vocab_size: Number of ids: 256 bytes, merges, special tokens.
        pattern: ``gpt2``, ``gpt4``, ``qwen2`` or an expression: how text is split into words.
        special_tokens: They split the text and are never merged.
        num_workers: Processes that count words; by default one per CPU core.
    """

    vocab_size: int = 4096
    pattern: str = "gpt4"
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    num_workers: int | None = None

    def train(self, texts: Iterable[str]) -> BPETokenizer:
        """Train on documents."""
        return BPETokenizer.train(
            texts,
            self.vocab_size,
            special_tokens=self.special_tokens,
            pattern=self.pattern,
            num_workers=self.num_workers,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSentencePiece(TrainedTokenizerPart, limits={"vocab_size": Limit.COUNT}):
    """Train a SentencePiece model with byte fallback; see `SentencePieceTokenizer.train`.

    Args:
        vocab_size: Number of ids: the unknown piece, special tokens, 256 bytes, pieces.
        model_type: Algorithm that chooses the pieces.
        special_tokens: They split the text and belong to no piece.
    """

    vocab_size: int = 4096
    model_type: Literal["bpe", "unigram"] = "unigram"
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)

    def train(self, texts: Iterable[str]) -> SentencePieceTokenizer:
        """Train on documents."""
        return SentencePieceTokenizer.train(
            texts, self.vocab_size, model_type=self.model_type, special_tokens=self.special_tokens
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCharacters(TrainedTokenizerPart):
    """Take every character of the training documents; see `CharacterTokenizer.train`.

    Args:
        special_tokens: Numbered after the characters.
    """

    special_tokens: tuple[str, ...] = (END_OF_TEXT,)

    def train(self, texts: Iterable[str]) -> CharacterTokenizer:
        """Train on documents."""
        return CharacterTokenizer.train(texts, special_tokens=self.special_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainWords(TrainedTokenizerPart, limits={"vocab_size": Limit.COUNT}):
    """Take the most frequent words of the training documents; see `WordTokenizer.train`.

    Args:
        vocab_size: Number of ids: words, the unknown one, special tokens.
        pattern: ``gpt2``, ``gpt4``, ``qwen2`` or an expression: how text is split into words.
        special_tokens: They split the text and are no words.
    """

    vocab_size: int = 32_768
    pattern: str = "gpt2"
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)

    def train(self, texts: Iterable[str]) -> WordTokenizer:
        """Train on documents."""
        return WordTokenizer.train(texts, self.vocab_size, special_tokens=self.special_tokens, pattern=self.pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadTokenizer(TokenizerPart):
    """Open a tokenizer that exists; see `load_tokenizer`.

    Args:
        path: A folder or file.
    """

    path: str = dataclasses.field(kw_only=False)

    def build(self, texts: Texts, cache_dir: Path | str | None = None) -> BaseTokenizer:  # noqa: ARG002
        """Return the tokenizer; texts and cache are not looked at."""
        return load_tokenizer(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes(TokenizerPart):
    """One token a byte of UTF-8; nothing to train.

    Args:
        special_tokens: Numbered from 256 on.
    """

    special_tokens: tuple[str, ...] = (END_OF_TEXT,)

    def build(self, texts: Texts, cache_dir: Path | str | None = None) -> BaseTokenizer:  # noqa: ARG002
        """Return the tokenizer; texts and cache are not looked at."""
        return ByteTokenizer(self.special_tokens)
