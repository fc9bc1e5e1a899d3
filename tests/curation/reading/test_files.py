"""Files of every kind that a crawl has: encodings, HTML, PDF written by hand, records, and what cannot be read."""

import codecs
import gzip
import json

import pytest

from lightning_lm.curation import Document, Reading, Unreadable
from lightning_lm.curation.reading.encoding import decode
from lightning_lm.curation.reading.layout import Box, page_text

RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 3
GERMAN = "Zwölf große Boxkämpfer jagen Viktor quer über den Sylter Deich – „schön“. " * 3


@pytest.mark.parametrize(
    ("data", "declared", "text"),
    [
        (GERMAN.encode(), None, GERMAN),
        (GERMAN.encode(), "iso-8859-1", GERMAN),
        (GERMAN.encode("cp1252"), "iso-8859-1", GERMAN),
        (GERMAN.encode("cp1252"), None, GERMAN),
        (codecs.BOM_UTF8 + GERMAN.encode(), "cp1251", GERMAN),
        (GERMAN.encode("utf-16"), None, GERMAN),
        (GERMAN.encode("utf-16-le"), None, GERMAN),
        (RUSSIAN.encode("cp1251"), None, RUSSIAN),
        (RUSSIAN.encode("koi8-r"), "koi8-r", RUSSIAN),
        ("日本語の文章".encode("iso2022_jp"), "iso-2022-jp", "日本語の文章"),
        ("日本語の文章です。".encode("shift_jis"), "no-such-encoding; x", None),
        (
            b"a" * 90 + "é".encode() + b"b" * 90 + b"\xe9" + "ü".encode() * 9,
            None,
            "a" * 90 + "é" + "b" * 90 + "é" + "ü" * 9,
        ),
        (b"", None, ""),
        (b"\0\0", None, "\0\0"),
    ],
    ids=range(14),
)
def test_encodings_are_decided_from_the_bytes(data, declared, text):
    found = decode(data, declared)
    assert text is None or found == text
    assert len(found) >= len(data) // 4, "no byte is dropped"


def test_a_page_declares_its_own_encoding():
    page = f'<html><head><meta charset="windows-1251"></head><p>{RUSSIAN}'
    assert decode(page.encode("cp1251"), is_html=True) == page
    page = f'<?xml version="1.0" encoding="koi8-r"?><p>{RUSSIAN}'
    assert decode(page.encode("koi8-r"), is_html=True) == page


def pdf(*pages: str, catalog: str = "", trailer: str = "") -> bytes:
    """Return a PDF file with the content streams of pages."""
    kids = " ".join(f"{3 + 2 * index} 0 R" for index in range(len(pages)))
    font = "<< /Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    objects = [f"<< /Type /Catalog /Pages 2 0 R {catalog} >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for index, page in enumerate(pages):
        box = "/MediaBox [0 0 600 800]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {box} /Resources {font} /Contents {4 + 2 * index} 0 R >>")
        objects.append(f"<< /Length {len(page)} >>\nstream\n{page}\nendstream")
    data, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    end += f"trailer << /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(data)}\n%%EOF"
    return (data + end).encode("latin-1")


def lines(*placed: tuple[int, int, str]) -> str:
    return "\n".join(f"BT /F 10 Tf {x} {y} Td ({text}) Tj ET" for x, y, text in placed)


def read(path, **settings) -> list[Document | Unreadable]:
    return list(Reading(**settings).documents(path, path.name, "in"))


def test_a_pdf_gives_its_pages_in_reading_order(tmp_path):
    column = [(60, 700 - 14 * row, f"left {row} fills all of its column here as texts do") for row in range(6)]
    other = [(330, 700 - 14 * row, f"right {row} fills all of its column here as texts do") for row in range(6)]
    mixed = [line for pair in zip(other, column, strict=True) for line in pair]
    (tmp_path / "a.pdf").write_bytes(
        pdf(lines((60, 740, "A title over both columns of the page, as papers have"), *mixed))
    )
    (document,) = read(tmp_path / "a.pdf")
    assert document.metadata["pages"] == 1
    found = document.text.split("\n")
    assert found[0].startswith("A title")
    words = [line.split()[:2] for line in found if line.startswith(("left", "right"))]
    assert words == [[side, str(row)] for side in ("left", "right") for row in range(6)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%PDF-1.4\nnothing that is a document", "broken PDF"),
        (pdf(lines((60, 700, "text")))[:-120], None),
        (pdf(""), "PDF without text"),
        (pdf(lines((60, 700, "x")), trailer="/Encrypt << /Filter /Standard /V 9 >>"), "encrypted PDF"),
    ],
    ids=["broken", "broken xref", "scanned", "encrypted"],
)
def test_pdfs_that_give_no_text_are_counted_with_a_reason(data, reason, tmp_path):
    (tmp_path / "a.pdf").write_bytes(data)
    (found,) = read(tmp_path / "a.pdf")
    assert reason is None or found.reason == reason


def test_a_pdf_of_many_pages_stops_at_the_limit(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(*[lines((60, 700, "a line of text on this page")) for _ in range(300)]))
    (found,) = read(tmp_path / "a.pdf")
    assert found.text.count("\f") == 299
    (found,) = read(tmp_path / "a.pdf", max_document_bytes=1000)
    assert found.reason == "larger than a document may be"
    assert "page 38" in found.place


def test_one_column_with_a_table_is_read_line_by_line():
    table = [Box(60, 700 - 14 * row, 90, 710 - 14 * row, f"k{row}") for row in range(9)]
    table += [Box(300, 700 - 14 * row, 330, 710 - 14 * row, f"v{row}") for row in range(9)]
    assert page_text(table, 600).split("\n") == [f"k{row} v{row}" for row in range(9)]
    assert page_text([], 600) == ""


def test_html_is_known_by_content_or_name(tmp_path):
    (tmp_path / "page").write_text("<!-- made by hand --><!DOCTYPE html><title>t</title><p>text")
    (tmp_path / "part.htm").write_text("<p>text without a frame")
    (tmp_path / "packed.html.gz").write_bytes(gzip.compress(b"<p>text"))
    (tmp_path / "about.txt").write_text("How to write <html> and other marks")
    types = {path.name: read(path)[0].metadata.get("_media_type") for path in tmp_path.iterdir()}
    assert types == {"page": "text/html", "part.htm": "text/html", "packed.html.gz": "text/html", "about.txt": None}


def test_records_keep_url_and_metadata_and_bad_ones_are_counted(tmp_path):
    rows = [
        '{"text": "one", "url": "http://a", "score": 2}',
        "{broken",
        '{"body": 1}',
        '{"text": "lone \\ud800"}',
        '"bare"',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    one, broken, none, lone, bare = read(tmp_path / "a.jsonl")
    assert (one.text, one.url, dict(one.metadata)) == ("one", "http://a", {"score": 2, "_source": "in"})
    assert (broken.reason, none.reason, lone.reason) == ("not JSON", "no text in the record", "no text in the record")
    assert broken.place.endswith("a.jsonl, line 2")
    assert bare.text == "bare"
    ours = {"id": "0" * 32, "text": "one", "url": "http://a", "metadata": {"score": 2}}
    (tmp_path / "b.jsonl").write_text(json.dumps(ours))
    assert read(tmp_path / "b.jsonl")[0].id == one.id, (
        "an output that is read again has the documents that it was made of"
    )


def test_a_line_that_is_too_long_is_counted_without_being_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "short"}))
    (tmp_path / "b.txt").write_text("y" * 5000 + "<|endoftext|>short")
    for name in ("a.jsonl", "b.txt"):
        long, short = read(tmp_path / name, max_document_bytes=1000)
        assert (long.reason, short.text) == ("larger than a document may be", "short")
        assert "max_document_bytes" in long.detail


def test_text_in_unknown_or_mixed_encodings_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(GERMAN.encode("cp1252") + b"<|endoftext|>" + GERMAN.encode("cp1252"))
    assert [document.text for document in read(tmp_path / "a.txt")] == [GERMAN, GERMAN]
    (tmp_path / "b.txt").write_bytes((GERMAN * 20).encode() + "naïve".encode("latin-1"))
    assert read(tmp_path / "b.txt")[0].text == GERMAN * 20 + "naïve"


def test_files_that_are_no_text_are_one_record_each(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"text" * 1000)[:-9])
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.txt").symlink_to("nowhere")
    reasons = {path.name: [item.reason for item in read(path)] for path in sorted(tmp_path.iterdir())}
    assert [len(found) for found in reasons.values()] == [1, 1, 1, 1]
    assert reasons["c.txt"] == ["empty file"]
