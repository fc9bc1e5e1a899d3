"""Documents on their way through a pipeline, and the record of one that a step removed."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Document", "Removed", "as_document", "as_documents", "document_id"]

_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its origin.

    Args:
        id: 32 hexadecimal digits, a digest of content and origin; see `document_id`. Steps leave it as it is.
        text: The text, or the markup of a page that has not been extracted yet.
        url: Address of the page, or name of the file.
        metadata: Fields beside the text, as JSON can store them. Names with a leading underscore are not written.
    """

    id: str
    text: str
    url: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Removed:
    """A document that a step removed, with the rule, and the measured value with its limit if there is one.

    Args:
        document: The document as the step got it.
        rule: Name of the rule, in lower case with underscores, such as ``mean_word_length``.
        value: The measured value; ``None`` if the rule measures nothing.
        limit: The limit that the value broke.
        duplicate_of: Id of the document that was kept instead, for a duplicate.
    """

    document: Document
    rule: str
    value: float | str | None = None
    limit: float | str | None = None
    duplicate_of: str | None = None


def document_id(text: str, url: str | None = None, metadata: Mapping[str, Any] | None = None) -> str:
    """Return the id of a document, a function of content and origin alone: no position, file or process enters it.

    Args:
        text: The text as it was read.
        url: Address of the page, or name of the file.
        metadata: Fields beside the text; names with a leading underscore do not count.
    """
    fields = {key: value for key, value in (metadata or {}).items() if not key.startswith("_")}
    origin = json.dumps([url, fields], sort_keys=True, default=str)
    digest = hashlib.blake2b(origin.encode("utf-8", "surrogatepass"), digest_size=_ID_BYTES)
    digest.update(b"\0")
    digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def as_document(text: str, url: str | None = None, metadata: Mapping[str, Any] | None = None) -> Document:
    """Return a text as a document with its id.

    Args:
        text: The text.
        url: Address of the page, or name of the file.
        metadata: Fields beside the text.
    """
    return Document(document_id(text, url, metadata), text, url, metadata or {})


def as_documents(items: Iterable[Document | str]) -> Iterable[Document]:
    """Return documents, made of texts where needed.

    Args:
        items: Documents or texts.
    """
    return (item if isinstance(item, Document) else as_document(item) for item in items)
