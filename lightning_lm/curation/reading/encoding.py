"""Text out of bytes whose encoding nobody guarantees: byte-order mark, UTF-8, declared encodings, detection.

No byte is dropped. Text that is valid UTF-8 beyond ASCII is taken for UTF-8 whatever a header declares, because text in
another encoding almost never is. Bytes that no candidate decodes are read as Windows-1252 within UTF-8, the usual
mixture on the web.
"""

import codecs
import re
from collections.abc import Iterator

from lightning_lm.data.decoding import bom_encoding, wide_encoding
from lightning_lm.data.unpacking import import_optional

__all__ = ["decode"]

_META = re.compile(rb"""<meta[^>]{0,512}?charset\s*=\s*["']?\s*([\w.:-]{2,40})""", re.IGNORECASE)
_XML = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]{2,40})""")
_HEAD = 4096
_SEVEN_BIT = ("iso2022", "hz", "utf-7")
"""Encodings whose text is valid ASCII and means something else."""
_HANDLER = "lightning_lm.windows_1252"


def decode(data: bytes, declared: str | None = None, *, is_html: bool = False) -> str:
    """Return the text of bytes.

    Args:
        data: The bytes, as a file or a server has them.
        declared: Encoding that the server declared.
        is_html: Look for an encoding that the page itself declares.
    """
    if data.startswith(codecs.BOM_UTF8):
        data = data[len(codecs.BOM_UTF8) :]
    mark = bom_encoding(data)
    if mark is not None:
        return data.decode(mark, "replace")
    labels = [label for label in (declared, *(_declared_inside(data) if is_html else ())) if label]
    names = [name for label in labels if (name := _codec(label)) is not None]
    text = _strictly(data, [name for name in names if name.startswith(_SEVEN_BIT)])
    text = _strictly(data, ["utf-8"]) if text is None else text
    if text is not None and "\0" not in text[:_HEAD]:
        return text
    wide = wide_encoding(data[: 1 << 16])
    if wide is not None:
        return data.decode(wide, "replace")
    if text is not None:
        return text
    return _other_than_utf8(data, names)


def _other_than_utf8(data: bytes, names: list[str]) -> str:
    text = _strictly(data, [name for name in names if name != "utf-8"])
    if text is None and not _mostly_utf8(data):
        encoding = import_optional("resiliparse.parse.encoding", "detect encodings", extra="curation")
        text = _strictly(data, filter(None, [_codec(encoding.detect_encoding(data, from_html_meta=False))]))
    if text is None:
        codecs.register_error(_HANDLER, _windows_1252)
        text = data.decode("utf-8", _HANDLER)
    return text


def _declared_inside(data: bytes) -> Iterator[str]:
    head = data[:_HEAD]
    for expression in (_XML, _META):
        found = expression.search(head)
        if found is not None:
            yield found[1].decode("ascii", "replace")


def _codec(label: str) -> str | None:
    """Return the codec that browsers use for a label, or None if there is none."""
    encoding = import_optional("resiliparse.parse.encoding", "detect encodings", extra="curation")
    name = encoding.map_encoding_to_html5(label, fallback_utf8=False) or label
    try:
        info = codecs.lookup(name.strip())
        "".encode(info.name)
    except (LookupError, ValueError):
        return None
    return None if info.name.startswith(("utf-16", "utf-32")) else info.name


def _strictly(data: bytes, names: "list[str] | Iterator[str]") -> str | None:
    for name in names:
        try:
            return data.decode(name)
        except UnicodeDecodeError:
            continue
    return None


def _mostly_utf8(data: bytes) -> bool:
    """Tell whether most bytes beyond ASCII belong to valid UTF-8."""
    sample = data[: 1 << 20]
    beyond = len(sample) - len(sample.decode("ascii", "ignore"))
    invalid = sample.decode("utf-8", "replace").count("\N{REPLACEMENT CHARACTER}")
    return invalid * 4 < beyond


def _windows_1252(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    byte = error.object[error.start : error.start + 1]
    return byte.decode("cp1252", "replace"), error.start + 1
