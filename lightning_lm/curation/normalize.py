"""Text in one normal form: composed characters, repaired encodings, line feeds, no control characters."""

import dataclasses
import re
import unicodedata
from typing import Literal

from lightning_lm.curation.document import Document, Removed
from lightning_lm.errors import MissingDependencyError
from lightning_lm.parts import Part

__all__ = ["NormalizeText", "normalize_text"]

_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ufff9-\ufffb\ud800-\udfff]")
_ASCII_LINE_ENDS = "\r\x0b\x0c\x1c\x1d\x1e"
_ASCII_CONTROL = bytes(code for code in range(128) if _CONTROL.match(chr(code)))
_SPACES = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_MOJIBAKE = re.compile("[\xc2-\xf4][\x80-\xbf\u0152-\u0192\u02c6-\u02dc\u2013-\u203a\u20ac\u2122]")
"""A lead byte and a continuation byte of UTF-8, both read as Latin-1 or Windows-1252."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizeText(Part):
    """Brings text into one normal form.

    Args:
        form: Unicode normal form; ``None`` leaves characters as they are.
        mojibake: Repair UTF-8 that was read as another encoding, such as "Ã©" for "é", by ``ftfy``.
        control_characters: Keep control characters, zero-width spaces, byte order marks and lone surrogates, all of
            which are removed by default. Joiners stay, since several scripts and emoji need them.
        collapse_spaces: Make one space of several, which would destroy the indentation of code.
    """

    form: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = "NFC"
    mojibake: bool = True
    control_characters: bool = False
    collapse_spaces: bool = False

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document with its text in normal form.

        Args:
            document: The document.
        """
        text = normalize_text(document.text, self)
        return document if text == document.text else dataclasses.replace(document, text=text)


def normalize_text(text: str, rules: NormalizeText = NormalizeText()) -> str:
    r"""Return a text in normal form, with line feeds as line ends, no space before them, and one blank line at most.

    Args:
        text: Text of a document.
        rules: The normal form.

    Raises:
        MissingDependencyError: If there is text to repair and ``ftfy`` is not installed.

    Example:
        >>> normalize_text("CafÃ©\u0000 au lait \r\n\n\n\nfin")
        'Café au lait\n\nfin'
    """
    if not text.isascii() or any(end in text for end in _ASCII_LINE_ENDS):
        text = _LINE_ENDS.sub("\n", text)
    if rules.mojibake and not text.isascii() and _MOJIBAKE.search(text):
        text = _repair(text)
    if not rules.control_characters:
        text = _without_control_characters(text)
    if rules.form is not None and not text.isascii():
        text = unicodedata.normalize(rules.form, text)
    text = _SPACES.sub(" ", text) if rules.collapse_spaces else text
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def _without_control_characters(text: str) -> str:
    if text.isascii():
        return text.encode().translate(None, _ASCII_CONTROL).decode()
    return _CONTROL.sub("", text)


def _repair(text: str) -> str:
    try:
        from ftfy import fix_encoding
    except ModuleNotFoundError as error:
        raise MissingDependencyError("ftfy", "repair mojibake", "curation") from error
    return "\n".join(fix_encoding(line) if _MOJIBAKE.search(line) else line for line in text.split("\n"))
