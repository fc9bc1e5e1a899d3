"""Where documents come from, and what happens to files that hold none."""

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lightning_lm.data import Files, Mixture, StandardLibrary, Texts, as_source, decoding, unpacking
from lightning_lm.errors import ConfigurationError, DataError, MissingDependencyError
from lightning_lm.parts import Part

STORIES = "Once upon a time.\n<|endoftext|>\nThe end,\n\nor not?\r\n<|endoftext|><|endoftext|>\nüber 😀"


def read(path, **how):
    return list(Files(path=str(path), **how).documents())


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_text_file_is_cut_at_its_separator_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(unpacking, "_BLOCK", block)
    path = tmp_path / "stories.txt"
    path.write_text(STORIES, encoding="utf-8", newline="")
    assert read(path) == ["Once upon a time.", "The end,\n\nor not?", "über 😀"]
    assert read(path, separator=None) == [STORIES]
    assert read(path, separator="\n\n") == ["Once upon a time.\n<|endoftext|>\nThe end,", STORIES.split("\n\n")[1]]


def test_a_file_without_a_separator_is_one_document_to_the_last_byte(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\n\ndef f():\r\n    pass\n\n")
    assert read(tmp_path / "a.py") == ["\n\ndef f():\r\n    pass\n\n"]


def test_a_folder_gives_what_is_text_and_counts_what_is_not(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("first")
    (tmp_path / "c.utf16.txt").write_text("third", encoding="utf-16")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\0\rIHDR")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("not this")
    with pytest.warns(UserWarning, match=r"Skipped 2 file\(s\).*image.png, latin.txt"):
        assert read(tmp_path) == ["first", "second", "third"]


def test_records_in_all_their_files(tmp_path):
    records = [{"text": "one"}, {"text": "zwei\nlines", "id": 2}]
    lines = "\n\n".join(json.dumps(record) for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    # Two frames, as parallel packers write them.
    packed = zstandard.compress(lines[:9]) + zstandard.compress(lines[9:])
    (tmp_path / "c.jsonl.zst").write_bytes(packed)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "zwei\nlines"]}), tmp_path / "d.parquet")
    assert read(tmp_path) == ["one", "zwei\nlines"] * 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "no field 'text'; it has 'body', 'id'. Pass field="),
        ("a.jsonl", b'{"text": 5}', "holds int, not text"),
        ("a.jsonl", b"[1]", "got list"),
        ("a.txt.gz", b"no gzip", "damaged or not what its name says"),
        ("a.txt.zst", b"no zstandard", "damaged or not what its name says"),
        ("a.parquet", b"no parquet", "cannot be read as Parquet"),
        ("a.txt", b"ok \xff\xfe\xfd", "not UTF-8 text (near byte 3"),
    ],
)
def test_a_single_file_that_cannot_be_read_says_where_and_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_a_file_too_long_for_one_document_asks_for_the_separator(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_LONGEST", 100)
    monkeypatch.setattr(unpacking, "_BLOCK", 10)
    (tmp_path / "a.txt").write_text("ab\n" * 50)
    with pytest.raises(DataError, match="separator="):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", separator="\n") == ["ab"] * 50


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'content', 'n'"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", field="content") == ["x"]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file or folder .*gone"):
        read(tmp_path / "gone")
    with pytest.raises(DataError, match="no file that matches"):
        read(tmp_path)


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*lightning-lm\[files\]"):
        read(tmp_path / "a.txt.zst")


def test_the_fingerprint_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = Files(path=str(path)).fingerprint
    assert Files(path=str(path)).fingerprint == first
    assert Files(path=str(path), separator=None).fingerprint != first
    os.utime(path, ns=(1, 1))
    assert Files(path=str(path)).fingerprint != first
    assert Files(path=str(path)).num_bytes == 9


class Dataset(list):
    _fingerprint = "abc"


def test_texts_already_in_python():
    assert list(Texts(texts=["a", {"text": "b"}, ""]).documents()) == ["a", "b"]
    assert list(as_source(lambda: iter(["a"])).documents()) == ["a"]
    assert Texts(texts=["a", "bc"]).fingerprint != Texts(texts=["ab", "c"]).fingerprint
    assert Texts(texts=(text for text in "ab")).fingerprint is None
    assert Texts(texts=Dataset(["a"])).fingerprint == Texts(texts=Dataset()).fingerprint
    with pytest.raises(DataError, match=r"item 1.*no field"):
        list(Texts(texts=["a", {"body": "b"}]).documents())


def test_what_is_no_source_is_refused(tmp_path):
    assert as_source(tmp_path) == Files(path=str(tmp_path))
    with pytest.raises(DataError, match="int is no text source"):
        as_source(5)


def test_the_standard_library_is_sorted_code_without_tests():
    source = StandardLibrary()
    documents = list(source.documents())
    assert documents == list(source.documents())
    assert any("class JSONDecoder(" in text for text in documents)
    assert not any("class TestCase0" in text or "import pytest" in text for text in documents)
    assert 3e6 < sum(map(len, documents)) < 5e7
    assert source.fingerprint == StandardLibrary().fingerprint
    assert not any(part in {"test", "tests", "idle_test", "site-packages"} for p in source._paths() for part in p.parts)


def test_a_python_without_sources_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="Pass your own text"):
        list(StandardLibrary().documents())


def test_a_mixture_reads_all_and_needs_a_weight_for_each():
    parts = Texts(texts=["a"]), Texts(texts=["b", "c"])
    assert list(Mixture(sources=parts, weights=(1, 2)).documents()) == ["a", "b", "c"]
    assert Mixture(sources=parts).fingerprint != Mixture(sources=parts[::-1]).fingerprint
    assert Mixture(sources=(Texts(texts=iter("a")),)).fingerprint is None
    with pytest.raises(ConfigurationError, match="2 sources and 1 weights"):
        Mixture(sources=parts, weights=(1,))


def test_sources_survive_as_plain_data():
    source = Mixture(sources=(Files(path="a"), StandardLibrary()), weights=(0.5, 0.5))
    assert Part.from_dict(source.to_dict()) == source
    assert Path(Files(path="a").path) == Path("a")
