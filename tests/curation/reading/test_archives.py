"""Web archives written by hand, whole and damaged in each way that crawls are."""

import gzip
import zlib

import pytest

from lightning_lm.curation import Document, Reading, Unreadable
from lightning_lm.curation.reading.archives import read_archive
from lightning_lm.curation.reading.outcome import Limits

LIMITS = Limits(1_000_000, 200.0)


def page(name: str, body: bytes = b"", headers: str = "", status: str = "200 OK", kind: str = "text/html") -> bytes:
    body = body or f"<p>{name}</p>".encode()
    http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{headers}\r\n".encode() + body
    return record("response", f"http://host/{name}", http, "application/http; msgtype=response")


def record(warc_type: str, url: str, block: bytes, kind: str, length: int | None = None) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {warc_type}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
    head += f"Content-Type: {kind}\r\nContent-Length: {len(block) if length is None else length}\r\n\r\n"
    return head.encode() + block + b"\r\n\r\n"


def read(tmp_path, data: bytes, name: str = "crawl.warc", **span) -> tuple[list[Document], list[Unreadable]]:
    path = tmp_path / name
    path.write_bytes(data)
    found = list(read_archive(path, LIMITS, **span))
    return (
        [item for item in found if isinstance(item, Document)],
        [item for item in found if isinstance(item, Unreadable)],
    )


def names(documents: list[Document]) -> list[str]:
    return [document.url.rpartition("/")[2] for document in documents]


@pytest.mark.parametrize("packed", [False, True])
def test_pages_come_with_url_date_and_text_and_other_records_do_not(packed, tmp_path):
    records = [
        record("warcinfo", "", b"software: x", "application/warc-fields"),
        record("request", "http://host/a", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        page("a"),
        page("b", "<p>naïve</p>".encode("latin-1"), kind="text/html; charset=iso-8859-1"),
        page("c", b"plain", kind="text/plain"),
        record("conversion", "http://host/d", "café".encode(), "text/plain"),
        record("metadata", "http://host/a", b"fetchTimeMs: 1", "application/warc-fields"),
    ]
    data = b"".join(map(gzip.compress, records) if packed else records)
    documents, left_out = read(tmp_path, data, "crawl.warc.gz" if packed else "crawl.warc")
    assert [document.text for document in documents] == ["<p>a</p>", "<p>naïve</p>", "plain", "café"]
    assert [document.metadata.get("_media_type") for document in documents] == ["text/html", "text/html", None, None]
    assert documents[0].url == "http://host/a"
    assert documents[0].metadata["date"] == "2020-01-01T00:00:00Z"
    assert left_out == []


def bodies() -> list[tuple[str, bytes]]:
    text = b"<p>body</p>"
    chunked = b"4\r\n<p>b\r\n7;x=1\r\nody</p>\r\n0\r\n\r\n"
    raw = zlib.compressobj(wbits=-15)
    return [
        ("Content-Encoding: gzip\r\n", gzip.compress(text)),
        ("Content-Encoding: deflate\r\n", zlib.compress(text)),
        ("Content-Encoding: deflate\r\n", raw.compress(text) + raw.flush()),
        ("Transfer-Encoding: chunked\r\n", chunked),
        ("Content-Encoding: gzip\r\n", text),  # stored unpacked, with the old headers
        ("Transfer-Encoding: chunked\r\n", text),
        ("Content-Encoding: identity\r\n", text),
    ]


@pytest.mark.parametrize(("headers", "body"), bodies(), ids=range(7))
def test_bodies_are_unpacked_as_their_headers_say(headers, body, tmp_path):
    documents, left_out = read(tmp_path, page("a", body, headers) + page("b"))
    assert [document.text for document in documents] == ["<p>body</p>", "<p>b</p>"]
    assert left_out == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (
            page("x", gzip.compress(b"<p>" + bytes(range(256)) * 9)[:-30], "Content-Encoding: gzip\r\n"),
            "does not unpack",
        ),
        (page("x", gzip.compress(b"0" * 2_000_000), "Content-Encoding: gzip\r\n"), "does not unpack"),
        (page("x", b"5\r\n<p>", "Transfer-Encoding: chunked\r\n"), "does not unpack"),
        (page("x", b"abc", "Content-Encoding: br\r\n"), "does not unpack"),
        (page("x", b"abc", "Content-Encoding: rot13\r\n"), "does not unpack"),
        (page("x", b"<p>gone</p>", status="404 Not Found"), "another HTTP status"),
        (page("x", b"\x89PNG", kind="image/png"), "no text page"),
        (page("x", b"0" * 1_000_001), "larger than"),
        (page("x", b"%PDF-1.4 nothing", kind="application/pdf"), "broken PDF"),
        (record("response", "http://host/x", b"HTTP/1.1 200 OK\r\n\r\n<p>x</p>", "application/http", 12), "damaged"),
        (record("response", "http://host/x", b"HTTP/1.1 200 OK\r\n\r\n<p>x</p>", "application/http", 60), "damaged"),
        (b"noise between records\r\n\r\n", "damaged"),
    ],
    ids=range(12),
)
def test_a_bad_record_is_counted_and_the_rest_is_read(bad, reason, tmp_path):
    documents, left_out = read(tmp_path, page("a") + bad + page("b") + page("c"))
    assert names(documents) == ["a", "b", "c"]
    assert len(left_out) == 1
    assert reason in left_out[0].reason
    assert "crawl.warc" in left_out[0].place


def test_an_archive_that_was_cut_loses_its_last_record_alone(tmp_path):
    whole = page("a") + page("b") + page("c")
    for missing in (5, 12, 60, len(page("c")) - 10):
        documents, left_out = read(tmp_path, whole[:-missing])
        assert names(documents) == ["a", "b"]
        assert len(left_out) == 1
    assert names(read(tmp_path, whole[:-4])[0]) == ["a", "b", "c"]
    packed = b"".join(map(gzip.compress, (page("a"), page("b"), page("c"))))
    documents, left_out = read(tmp_path, packed[:-30], "crawl.warc.gz")
    assert names(documents) == ["a", "b"]
    assert len(left_out) == 1


def test_a_damaged_member_of_a_compressed_archive_is_counted(tmp_path):
    members = [gzip.compress(page(name)) for name in "abcd"]
    members[1] = members[1][:60] + bytes(10) + members[1][70:]
    documents, left_out = read(tmp_path, b"".join(members), "crawl.warc.gz")
    assert names(documents) == ["a", "c", "d"]
    assert len(left_out) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_parts_of_an_archive_give_each_record_once(packed, tmp_path):
    records = [page(f"{number}", b"<p>" + b"x" * (37 * number % 90)) for number in range(40)]
    data = b"".join(map(gzip.compress, records) if packed else records)
    for size in (100, 333, 1000, len(data)):
        found = []
        for first in range(0, len(data), size):
            documents, left_out = read(tmp_path, data, first=first, last=min(first + size, len(data)))
            found += names(documents)
            assert left_out == []
        assert found == [str(number) for number in range(40)]


def test_archives_are_known_by_their_content(tmp_path):
    (tmp_path / "download").write_bytes(gzip.compress(page("a")))
    found = list(Reading().documents(tmp_path / "download", "download", "in"))
    assert [item.url for item in found] == ["http://host/a"]
    (missing,) = Reading().documents(tmp_path / "nothing.warc", "x", "in")
    assert missing.reason == "file that cannot be read"
