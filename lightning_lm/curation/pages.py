"""Running text from the pages of a document: without what repeats on each page, with words and paragraphs joined.

Lines come from the page as it was printed. A line that begins or ends most pages in the same words, numbers aside, is a
header or footer; a word that a hyphen divides at a line's end is joined unless the document writes it with the hyphen
elsewhere; and a line continues in the next if it fills the width of its page.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["text_of_pages"]

_EDGE_LINES = 3
_MIN_PAGES = 3
_MIN_FRACTION = 0.3
_FULL_LINE = 0.75
_MAX_NUMBERS = 4
"""Numbers of a header with words: a date and a page. Without words it has two, the page and the number of pages."""
_DIGITS = re.compile(r"\d+|\b[ivxlc]+\b", re.IGNORECASE)
_HYPHENATED = re.compile(r"(\w+)-$")
_STARTS = re.compile(r"[\-*\u2022\u2013\u25aa\u25cf\u25e6\u2043]\s|\(?\d{1,3}[.)]\s|[A-Za-z][.)]\s")
_LEADER = re.compile(r"(?:\s?\.){5,}")
_ENDS = tuple('.!?:;\u201d"')


def text_of_pages(text: str) -> str:
    """Return the text of a document whose pages are divided by form feeds and whose lines by line breaks.

    Args:
        text: Pages with an empty line between paragraphs, as far as they show one.
    """
    pages = [_without_margins(page.split("\n")) for page in text.split("\f")]
    repeated = _repeated(pages)
    kept = [_without_edges(page, repeated) for page in pages]
    words = Counter(re.findall(r"\w+(?:-\w+)+", " ".join(line for page in kept for line in page)))
    paragraphs: list[str] = []
    for page in kept:
        _add_page(page, paragraphs, words)
    return "\n\n".join(paragraphs)


def _without_margins(lines: Sequence[str]) -> list[str]:
    found = [_LEADER.sub(" ", line.rstrip()) for line in lines]
    while found and not found[-1]:
        found.pop()
    while found and not found[0]:
        found.pop(0)
    return found


def _edges(page: Sequence[str]) -> Iterable[int]:
    filled = [index for index, line in enumerate(page) if line]
    return {*filled[:_EDGE_LINES], *filled[-_EDGE_LINES:]}


def _pattern(line: str) -> str:
    """Return a line without its numbers, a table's row with them: rows look alike but do not repeat."""
    pattern, count = _DIGITS.subn("#", line)
    is_row = count > (_MAX_NUMBERS if re.search(r"\w", pattern) else 2)
    return " ".join((line if is_row else pattern).split()).lower()


def _repeated(pages: Sequence[Sequence[str]]) -> set[str]:
    """Return the patterns of lines at the edges of many pages; ``#``, a page number alone, needs only three."""
    counts = Counter(pattern for page in pages for pattern in {_pattern(page[index]) for index in _edges(page)})
    limit = max(_MIN_PAGES, _MIN_FRACTION * len(pages))
    return {pattern for pattern, count in counts.items() if count >= (_MIN_PAGES if _is_number(pattern) else limit)}


def _is_number(pattern: str) -> bool:
    return not re.sub(r"[#\W]|page|of|seite|von", "", pattern)


def _without_edges(page: Sequence[str], repeated: set[str]) -> list[str]:
    edges = _edges(page)
    return _without_margins([line for index, line in enumerate(page) if index not in edges or not _is(line, repeated)])


def _is(line: str, repeated: set[str]) -> bool:
    return _pattern(line) in repeated


def _add_page(page: Sequence[str], paragraphs: list[str], words: Counter[str]) -> None:
    """Append the paragraphs of a page; one that does not end a sentence continues the last of the page before."""
    width = _width(page)
    continues = bool(paragraphs and page) and not paragraphs[-1].endswith(_ENDS) and page[0][:1].islower()
    previous = width if continues else 0
    for line in page:
        if not line:
            previous = -1
            continue
        if previous == -1 or not paragraphs or (previous == 0 and not continues):
            paragraphs.append(line)
        elif previous >= _FULL_LINE * width and not _STARTS.match(line):
            paragraphs[-1] = _joined(paragraphs[-1], line, words)
        else:
            paragraphs[-1] += f"\n{line}"
        previous = len(line)
        continues = True


def _width(page: Sequence[str]) -> int:
    """Return the length of a full line, which one in ten lines reaches."""
    lengths = sorted(len(line) for line in page if line)
    return lengths[int(0.9 * (len(lengths) - 1))] if lengths else 0


def _joined(text: str, line: str, words: Counter[str]) -> str:
    divided = _HYPHENATED.search(text)
    if divided is None or not line[:1].islower():
        return text + (line if divided else f" {line}")
    rest = re.match(r"\w+", line)
    assert rest is not None
    if words[f"{divided[1]}-{rest[0]}"]:
        return text + line
    return text[:-1] + line
