"""Text out of the markup of pages: the fast extraction, the precise one, and one that keeps structure as Markdown.

`Extract` takes the main content by the heuristics of Resiliparse (Bevendorff et al. 2018, Elastic ChatNoir),
`ExtractPrecise` by those of Trafilatura (Barbaresi 2021), which are slower by an order of magnitude and leave out more
of what surrounds the content. All put the pages of PDF documents together, and pass plain text through.
"""

import dataclasses
import functools
import html
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lm.curation.document import Document, Removed
from lightning_lm.curation.markdown import markdown_of
from lightning_lm.curation.pages import text_of_pages
from lightning_lm.curation.reading.outcome import MEDIA_TYPE
from lightning_lm.curation.reading.pdf import PDF
from lightning_lm.data.unpacking import import_optional
from lightning_lm.parts import Limit, Part

__all__ = ["Extract", "ExtractMarkdown", "ExtractPrecise"]

_TITLE = re.compile(r"<title[^>]{0,200}>(.{0,1000}?)</title", re.IGNORECASE | re.DOTALL)
_NESTED = "a>,a ,ar,as,b>,b ,bi,bl,ce,ci,co,de,di,em,fi,fo,he,i>,i ,ma,na,ol,s>,se,sm,sp,st,su,ta,u>,ul"
"""First two characters of elements that nest. Paragraphs, items, rows and cells end where the next one begins."""
_FEW_TAGS = 512
_HEAD = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extract(Part, limits={"max_nesting": Limit.COUNT}):
    """The text of a page, by Resiliparse: paragraphs, lists, tables and code keep their lines.

    Args:
        main_content: Leave out navigation, headers, footers and comments; ``False`` takes all visible text.
        links: Write the target of a link after its text.
        alt_texts: Write the alternative text of images.
        max_nesting: Depth of elements beyond which a page is removed: browsers stop at 512, and extraction takes time
            that grows with its square.
    """

    main_content: bool = True
    links: bool = False
    alt_texts: bool = False
    max_nesting: int = 512

    def __call__(self, document: Document) -> Document | Removed:
        """Return the document with its text, or its removal if there is none.

        Args:
            document: Text with its media type among the metadata.
        """
        media_type = document.metadata.get(MEDIA_TYPE)
        metadata = {key: value for key, value in document.metadata.items() if key != MEDIA_TYPE}
        if media_type is None:
            return document
        if media_type == PDF:
            text = text_of_pages(document.text)
        else:
            depth = _depth(document.text)
            if depth > self.max_nesting:
                return Removed(document, "nesting", depth, self.max_nesting)
            metadata |= _title(document.text)
            text = self._extracted(document)
        if not text or text.isspace():
            return Removed(document, "no_text")
        return Document(document.id, text, document.url, metadata)

    def _extracted(self, document: Document) -> str:
        return self._plain(document.text, preserve_formatting=True)

    def _plain(self, markup: str, **settings: Any) -> str:
        text: str = _resiliparse().extract_plain_text(
            markup, main_content=self.main_content, links=self.links, alt_texts=self.alt_texts, **settings
        )
        return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractMarkdown(Extract):
    """The text of a page as Markdown: headings, lists and code blocks keep their marks.

    Args:
        main_content: Leave out navigation, headers, footers and comments; ``False`` takes all visible text.
        links: Write links with their targets.
        alt_texts: Write the alternative text of images.
        max_nesting: Depth of elements beyond which a page is removed.
    """

    def _extracted(self, document: Document) -> str:
        return markdown_of(self._plain(document.text, preserve_formatting="minimal_html"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractPrecise(Extract):
    """The text of a page, by Trafilatura: the precise alternative, some ten times slower.

    Args:
        main_content: Leave out comments below the content.
        links: Write links with their targets.
        alt_texts: Write the alternative text of images.
        max_nesting: Depth of elements beyond which a page is removed.
        favor: ``precision`` leaves out more, ``recall`` keeps more.
    """

    favor: str = "balance"

    def _extracted(self, document: Document) -> str:
        trafilatura = import_optional("trafilatura", "extract text precisely", extra="curation")
        text: str | None = trafilatura.extract(
            document.text,
            url=document.url,
            include_comments=not self.main_content,
            include_links=self.links,
            include_images=self.alt_texts,
            include_tables=True,
            favor_precision=self.favor == "precision",
            favor_recall=self.favor == "recall",
        )
        return text or ""


@functools.cache  # looking a module up takes a tenth of the time of a page
def _resiliparse() -> Any:
    return import_optional("resiliparse.extract.html2text", "extract text from pages", extra="curation")


def _title(markup: str) -> dict[str, str]:
    found = _TITLE.search(markup[:_HEAD])
    title = "" if found is None else " ".join(html.unescape(found[1]).split())
    return {"title": title} if title else {}


def _depth(markup: str) -> int:
    """Return an estimate of the depth of elements, 0 where too few tags are there to be deep."""
    if markup.count("<") <= _FEW_TAGS:
        return 0
    codes = np.frombuffer(markup.encode("utf-8", "replace") + b"   ", np.uint8)
    tags = np.flatnonzero(codes[:-3] == ord("<"))
    ends = codes[tags + 1] == ord("/")
    names = tags + 1 + ends
    first, second = codes[names] | 32, codes[names + 1] | 32
    nests = _nesting().take(first.astype(np.uint16) << 8 | second)
    depths = np.cumsum(np.where(ends, -1, 1)[nests])
    floors = np.minimum.accumulate(np.minimum(depths, 0))  # an end tag without its element closes nothing
    return int((depths - floors).max(initial=0))


@functools.cache
def _nesting() -> NDArray[np.bool_]:
    """Return whether elements nest by their first two characters in lower case."""
    table = np.zeros(1 << 16, bool)
    table[[int.from_bytes(name.encode(), "big") for name in _NESTED.split(",")]] = True
    return table
