"""Text of PDF documents, by PDFium: the pages, in reading order, with a form feed between them."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lm.curation.document import Document, as_document
from lightning_lm.curation.reading.layout import Box, page_text
from lightning_lm.curation.reading.outcome import MEDIA_TYPE, Limits, Unreadable, too_long
from lightning_lm.data.unpacking import import_optional

__all__ = ["PDF", "read_pdf"]

PDF = "application/pdf"
"""Media type of the text that `read_pdf` returns."""
_REASONS = {
    "Incorrect password": "encrypted PDF",
    "Unsupported security": "encrypted PDF",
    "Data format": "broken PDF",
    "File access": "file that cannot be opened",
}
_MAX_BOXES = 20_000
"""Pieces of text of a page beyond which it is a drawing: its text is taken in the order of the file."""
_HYPHENS = str.maketrans({"\ufffe": "-", "\x02": "-", "\u00ad": "-", "\0": None, "\r": None})
"""Marks that PDFium puts for a hyphen at the end of a line."""


def read_pdf(
    source: bytes | Path, url: str, place: str, limits: Limits, metadata: Mapping[str, Any] | None = None
) -> Document | Unreadable:
    """Return the document of a PDF file.

    Args:
        source: The file, or its bytes.
        url: Its address or name.
        place: File and record, for the report.
        limits: Limits on sizes.
        metadata: Fields beside the text.
    """
    pdfium = import_optional("pypdfium2", "read PDF files", extra="curation")
    try:
        with contextlib.closing(pdfium.PdfDocument(source)) as pdf:
            pages, size = list[str](), 0
            for index in range(len(pdf)):
                pages.append(_page(pdfium, pdf, index))
                size += len(pages[-1])
                if size > limits.document_bytes:
                    return too_long(f"{place}, page {index + 1}", size, "characters", limits)
    except pdfium.PdfiumError as error:
        reason = next((reason for mark, reason in _REASONS.items() if mark in str(error)), "broken PDF")
        return Unreadable(place, reason, str(error))
    if not any(page.strip() for page in pages):
        return Unreadable(place, "PDF without text", f"{len(pages):,} page(s), scanned or drawn; run OCR first")
    return as_document("\f".join(pages), url, {**(metadata or {}), "pages": len(pages), MEDIA_TYPE: PDF})


def _page(pdfium: Any, pdf: Any, index: int) -> str:
    """Return the text of a page; one that cannot be read is empty, as it is in viewers."""
    try:
        page = pdf[index]
    except pdfium.PdfiumError:
        return ""
    with contextlib.closing(page), contextlib.closing(page.get_textpage()) as text:
        count = text.count_rects()
        if count > _MAX_BOXES:
            whole: str = text.get_text_range()
            return whole.translate(_HYPHENS)
        areas = [text.get_rect(number) for number in range(count)]
        boxes = [Box(a[0], a[1], a[2], a[3], _cleaned(text.get_text_bounded(*a))) for a in areas]
        return page_text(boxes, page.get_width())


def _cleaned(text: str) -> str:
    return " ".join(text.translate(_HYPHENS).split("\n")).strip("\n")
