"""Counts that instructions are checked with: words, sentences, paragraphs, and the language of a text."""

import re

__all__ = ["capital_words", "count_sentences", "count_words", "is_language", "paragraphs"]

_ABBREVIATIONS = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Inc|Ltd|Co|vs|etc|e\.g|i\.e|Ph\.D|No(?=\.\s\d)|[A-HJ-Z])\.(?=\s|$)|(?<=\d)\.(?=\d)",
)
_NO_ENDS = re.compile(r"^\s*\(?\w{1,2}[.)](?=\s)|(?:\.{2,}|…)(?=\s+[a-z])", re.MULTILINE)
"""Numbers of a list, and dots of a pause: what follows goes on."""
_CLOSE = "(?:com|net|org|io|gov|edu|me)"
_CLOSELY_RELATED = {"zh": {"zh"}, "no": {"no", "nb", "nn", "da"}, "hr": {"hr", "sr", "bs"}, "id": {"id", "ms"}}


def count_words(text: str) -> int:
    """Return the number of runs of letters, digits and underscores.

    Args:
        text: A text.
    """
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Return the number of sentences: runs of text that end in marks, abbreviations and decimal points passed over.

    Args:
        text: A text.
    """
    text = _ABBREVIATIONS.sub(lambda match: match[0].replace(".", ""), text)
    text = re.sub(rf"\.(?={_CLOSE}\b)", "", text)
    text = _NO_ENDS.sub(" ", text)
    pieces = re.split(r"(?:[.!?…]+[\"'”’)\]*_]*(?=\s|$))|[。！？]+|\n\s*\n", text)  # noqa: RUF001
    return sum(bool(re.search(r"\w", piece)) for piece in pieces)


def paragraphs(text: str, separator: str) -> list[str] | None:
    """Return the paragraphs of a text, or ``None`` if one between others is empty; empty ends are passed over.

    Args:
        text: A text.
        separator: Regular expression of what parts them.
    """
    pieces = re.split(separator, text)
    for end in (0, -1):
        if pieces and not pieces[end].strip():
            pieces.pop(end)
    return None if any(not piece.strip() for piece in pieces) else pieces


def capital_words(text: str) -> int:
    """Return the number of words in capital letters, ``I`` and ``A`` among them; ``U.S.`` and ``AC/DC`` are one word.

    Args:
        text: A text.
    """
    return sum(word.isupper() for word in re.findall(r"[^\W_](?:[\w'’./-]*[^\W_])?", text))  # noqa: RUF001


def is_language(text: str, language: str) -> bool:
    """Return whether a text is in a language; one without letters is in any.

    Args:
        text: A text.
        language: ISO 639-1 code.
    """
    from lightning_lm.curation import identify_language

    found, _ = identify_language(text)
    wanted = language.lower().split("-")[0]
    return found == "und" or found in _CLOSELY_RELATED.get(wanted, {wanted})
