"""Tokenizers without merges: bytes, characters, words."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import TokenizerError
from lightning_lm.storage.json_text import parse_json
from lightning_lm.tokenizers.base import END_OF_TEXT, ByteTableTokenizer, number_special, read_marker, refuse_surrogates
from lightning_lm.tokenizers.patterns import SplitPattern
from lightning_lm.tokenizers.word_counts import Text, count_words

__all__ = ["UNKNOWN", "ByteTokenizer", "CharacterTokenizer", "WordTokenizer"]

UNKNOWN = "<|unk|>"
"""The special token for strings outside the vocabulary; it decodes to U+FFFD."""

_REPLACEMENT = "\ufffd".encode()


class ByteTokenizer(ByteTableTokenizer):
    """One id a byte of UTF-8, then the special tokens. It needs no training and encodes every text.

    Args:
        special_tokens: Names, numbered from 256 on.
        eos_token: The special token that ends a document.
    """

    def __init__(self, special_tokens: Sequence[str] = (END_OF_TEXT,), *, eos_token: str | None = None) -> None:
        table = [bytes([byte]) for byte in range(256)] + [token.encode() for token in special_tokens]
        super().__init__(table, number_special(special_tokens, 256), eos_token)

    def to_files(self) -> dict[str, str]:
        """Return the content of the only file."""
        return self._marker(special_tokens=list(self.special_tokens))

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> Self:
        """Return the tokenizer that `to_files` described."""
        settings = read_marker(files)
        return cls(settings["special_tokens"], eos_token=settings["eos_token"])

    def _extended(self, tokens: Sequence[str]) -> Self:
        return type(self)([*self.special_tokens, *tokens], eos_token=self.eos_token)

    def _encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())

    def _last_cut(self, text: str) -> int:
        return len(text)


class _ListedTokenizer(ByteTableTokenizer):
    """A tokenizer with a fixed list of strings; anything else becomes one special token."""

    def __init__(self, entries: Sequence[str], special_tokens: Sequence[str], eos_token: str | None) -> None:
        if UNKNOWN in special_tokens:
            raise TokenizerError(f"{UNKNOWN!r} is always there; leave it out of special_tokens.")
        special = number_special((UNKNOWN, *special_tokens), len(entries))
        table = [entry.encode() for entry in entries] + [token.encode() for token in special]
        table[special[UNKNOWN]] = _REPLACEMENT
        if eos_token is None and len(special_tokens) == 1:
            eos_token = special_tokens[0]
        super().__init__(table, special, eos_token)
        if self.eos_token == UNKNOWN:
            self.eos_token = None
        self.unk_id = special[UNKNOWN]
        self._entries = list(entries)
        self._ids = {entry: index for index, entry in enumerate(entries)}
        if len(self._ids) < len(entries):
            raise TokenizerError("An entry is in the vocabulary twice.")

    def _encode_entries(self, entries: Iterable[str]) -> list[int]:
        known, unknown = self._ids.get, self._special[UNKNOWN]
        return [known(entry, unknown) for entry in entries]

    def _listed_marker(self, **settings: Any) -> dict[str, str]:
        return {**self._marker(special_tokens=self._named, **settings), "entries.json": _dump(self._entries)}

    @property
    def _named(self) -> list[str]:
        return [token for token in self.special_tokens if token != UNKNOWN]


class CharacterTokenizer(_ListedTokenizer):
    """One id a character of the training texts; others become `UNKNOWN`.

    Args:
        characters: The vocabulary, in the order of the ids.
        special_tokens: Names, numbered after the characters and `UNKNOWN`.
        eos_token: The special token that ends a document.
    """

    def __init__(
        self, characters: Sequence[str], special_tokens: Sequence[str] = (END_OF_TEXT,), *, eos_token: str | None = None
    ) -> None:
        super().__init__(characters, special_tokens, eos_token)

    @classmethod
    def train(cls, texts: Iterable[str], *, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Self:
        """Take every character of the texts, in the order of Unicode."""
        characters: set[str] = set()
        for text in texts:
            refuse_surrogates(text)
            characters.update(text)
        return cls(sorted(characters), special_tokens)

    def to_files(self) -> dict[str, str]:
        """Return the content of the files."""
        return self._listed_marker()

    def _extended(self, tokens: Sequence[str]) -> Self:
        return type(self)(self._entries, [*self._named, *tokens], eos_token=self.eos_token)

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> Self:
        """Return the tokenizer that `to_files` described."""
        settings = read_marker(files)
        return cls(_load(files), settings["special_tokens"], eos_token=settings["eos_token"])

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._encode_entries(text)

    def _last_cut(self, text: str) -> int:
        return len(text)


class WordTokenizer(_ListedTokenizer):
    """One id for each of the most frequent words of the training texts; others become `UNKNOWN`.

    Words carry the space before them, so decoding known words gives the text back exactly.

    Args:
        words: The vocabulary, in the order of the ids.
        special_tokens: Names, numbered after the words and `UNKNOWN`.
        pattern: As in `BPETokenizer`.
        eos_token: The special token that ends a document.
    """

    def __init__(
        self,
        words: Sequence[str],
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        *,
        pattern: SplitPattern | str = "gpt2",
        eos_token: str | None = None,
    ) -> None:
        super().__init__(words, special_tokens, eos_token)
        self.pattern = SplitPattern.of(pattern)

    @classmethod
    def train(
        cls,
        texts: Iterable[Text],
        vocab_size: int,
        *,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        pattern: SplitPattern | str = "gpt2",
        num_workers: int | None = None,
    ) -> Self:
        """Take the most frequent words; among equally frequent ones the first in the order of bytes.

        Args:
            texts: Documents, or paths of UTF-8 text files.
            vocab_size: Number of ids: words, `UNKNOWN` and special tokens; fewer if there are not so many words.
            special_tokens: They split the text and are no words.
            pattern: As in the class.
            num_workers: Processes that count words; by default one a CPU core.

        Raises:
            TokenizerError: If the vocabulary is too small for a single word.
        """
        num_words = vocab_size - len(special_tokens) - 1
        if num_words < 1:
            needed = len(special_tokens) + 2
            raise TokenizerError(f"vocab_size={vocab_size} leaves no room for a word; use at least {needed}.")
        pattern = SplitPattern.of(pattern)
        counts = Counter(count_words(texts, pattern, special_tokens=special_tokens, num_workers=num_workers))
        chosen = sorted(counts, key=lambda word: (-counts[word], word))[:num_words]
        return cls([word.decode() for word in chosen], special_tokens, pattern=pattern)

    def word_starts(self) -> NDArray[np.bool_]:
        """Return bool [vocab_size]: every id begins a word."""
        return np.ones(self.vocab_size, dtype=np.bool_)

    def to_files(self) -> dict[str, str]:
        """Return the content of the files."""
        return self._listed_marker(pattern=self.pattern.to_dict())

    def _extended(self, tokens: Sequence[str]) -> Self:
        return type(self)(self._entries, [*self._named, *tokens], pattern=self.pattern, eos_token=self.eos_token)

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> Self:
        """Return the tokenizer that `to_files` described."""
        settings = read_marker(files)
        pattern = SplitPattern(**settings["pattern"])
        return cls(_load(files), settings["special_tokens"], pattern=pattern, eos_token=settings["eos_token"])

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._encode_entries(self.pattern.split(text))

    def _last_cut(self, text: str) -> int:
        return self.pattern.last_cut(text)


def _dump(entries: list[str]) -> str:
    return json.dumps(entries, ensure_ascii=False, indent=0)


def _load(files: Mapping[str, str]) -> list[str]:
    try:
        return [str(entry) for entry in parse_json(files["entries.json"])]
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError("entries.json is missing or damaged: these files are no complete tokenizer.") from error
