"""The files of GPT-2's tokenizer, ``vocab.json`` and ``merges.txt``, and how they write bytes as letters."""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lightning_lm.errors import TokenizerError
from lightning_lm.storage.json_text import parse_json
from lightning_lm.tokenizers.vocabulary import Merge, Vocabulary

__all__ = ["ParsedBPE", "from_letters", "parse", "render", "separate_special", "to_letters"]

_HEADER = "#version: 0.2"


class ParsedBPE(NamedTuple):
    """A byte-pair vocabulary as another program wrote it."""

    merges: list[Merge]
    ids: dict[bytes, int]
    special_tokens: dict[str, int]


def _letters() -> dict[int, str]:
    """GPT-2's letter for each byte: visible Latin-1 characters stand for themselves, the others are moved up to 256."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return {byte: chr(byte if byte in visible else next(moved)) for byte in range(256)}


_LETTER_OF_BYTE = _letters()
_BYTE_OF_LETTER = {letter: byte for byte, letter in _LETTER_OF_BYTE.items()}
_TO_LETTERS = str.maketrans({chr(byte): letter for byte, letter in _LETTER_OF_BYTE.items()})


def to_letters(token: bytes) -> str:
    """Return a token's bytes in GPT-2's spelling, in which a space is ``Ġ``."""
    return token.decode("latin-1").translate(_TO_LETTERS)


def from_letters(spelled: str) -> bytes | None:
    """Return the bytes that GPT-2's spelling stands for, None if it is not in this spelling."""
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in spelled])
    except KeyError:
        return None


def parse(vocab: str, merges: str) -> ParsedBPE:
    """Read the contents of ``vocab.json`` and ``merges.txt``.

    Raises:
        TokenizerError: If they are not in this format.
    """
    try:
        ids: dict[str, int] = parse_json(vocab)
    except ValueError as error:
        raise TokenizerError(f"vocab.json is no JSON: {error}.") from error
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    return separate_special(ids, read_merges(line.rstrip("\r").split(" ") for line in lines))


def read_merges(pairs: Iterable[list[str]]) -> list[Merge]:
    """Return merges from pairs of tokens in GPT-2's spelling.

    Raises:
        TokenizerError: If an entry is no such pair.
    """
    merges = []
    for number, pair in enumerate(pairs):
        tokens = [from_letters(part) for part in pair]
        if len(tokens) != 2 or not tokens[0] or not tokens[1]:
            raise TokenizerError(f"Merge {number} is {' '.join(pair)!r}, not two tokens in GPT-2's spelling of bytes.")
        merges.append((tokens[0], tokens[1]))
    return merges


def separate_special(ids: Mapping[str, int], merges: list[Merge]) -> ParsedBPE:
    """Take entries that are neither a byte nor made by a merge as special tokens."""
    ordinary = {bytes([byte]) for byte in range(256)} | {left + right for left, right in merges}
    token_ids: dict[bytes, int] = {}
    special: dict[str, int] = {}
    for spelled, number in ids.items():
        token = from_letters(spelled)
        if token in ordinary and token is not None:
            token_ids[token] = number
        else:
            special[spelled] = number
    return ParsedBPE(merges, token_ids, special)


def render(vocabulary: Vocabulary, special_tokens: Mapping[str, int]) -> dict[str, str]:
    """Return the contents of ``vocab.json`` and ``merges.txt``."""
    ids = {to_letters(token): number for token, number in vocabulary.ids.items()} | dict(special_tokens)
    ordered = dict(sorted(ids.items(), key=lambda item: item[1]))
    lines = [_HEADER, *(f"{to_letters(left)} {to_letters(right)}" for left, right in vocabulary.merges)]
    return {"vocab.json": json.dumps(ordered, ensure_ascii=False), "merges.txt": "\n".join(lines) + "\n"}
