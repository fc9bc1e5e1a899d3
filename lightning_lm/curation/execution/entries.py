"""Documents and removals as lines of JSON, between stages and in the output."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from lightning_lm.curation.document import Document, Removed
from lightning_lm.storage.json_text import parse_json

__all__ = ["document_of_line", "line_of_document", "line_of_removed", "numbered", "output_line"]

_SHOWN = 2000
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


def line_of_document(document: Document) -> bytes:
    """Return a document as a line; lone surrogates pass.

    Args:
        document: The document.
    """
    fields = [document.id, document.text, document.url, dict(document.metadata)]
    return _encode(fields).encode("utf-8", "surrogatepass")


def document_of_line(line: bytes) -> Document | None:
    """Return the document of a line, None if it is the line of a removed one.

    Args:
        line: As `line_of_document` or `line_of_removed` wrote it.
    """
    value = parse_json(line.decode("utf-8", "surrogatepass"))
    return Document(*value) if isinstance(value, list) else None


def line_of_removed(removed: Removed, step: str) -> bytes:
    """Return a removed document as a line, with the beginning of its text.

    Args:
        removed: The removal.
        step: Name of the step.
    """
    document = removed.document
    record = {
        "id": document.id,
        "url": document.url,
        "step": step,
        "rule": removed.rule,
        "value": removed.value,
        "limit": removed.limit,
        "duplicate_of": removed.duplicate_of,
        "length": len(document.text),
        "text": document.text[:_SHOWN],
    }
    return _encode({key: value for key, value in record.items() if value is not None}).encode("utf-8", "replace")


def output_line(document: Document) -> bytes:
    """Return a document as a line of the output.

    Args:
        document: The document.
    """
    metadata = {key: value for key, value in document.metadata.items() if not key.startswith("_")}
    record: dict[str, Any] = {"id": document.id, "text": document.text}
    record |= {"url": document.url} if document.url is not None else {}
    record |= {"metadata": metadata} if metadata else {}
    return _encode(record).encode("utf-8", "replace") + b"\n"


def numbered(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield documents that are sorted by id, each after the first of equal ids with a number after its id.

    Args:
        documents: Documents, in the order of their ids.
    """
    previous, count = "", 0
    for document in documents:
        count = count + 1 if document.id == previous else 0
        previous = document.id
        yield Document(f"{previous}-{count}", document.text, document.url, document.metadata) if count else document
