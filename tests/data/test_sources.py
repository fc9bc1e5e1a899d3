"""Where documents come from, and what happens to files that hold none."""

import gzip
import json
import os
import sys
from pathlib import Path

import datasets
import numpy as np
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


def test_a_folder_gives_what_is_text_and_names_what_is_not(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("first")
    (tmp_path / "c.utf16.txt").write_text("third", encoding="utf-16")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "blob").write_bytes(b"\1\0\0\0\0\0\2")
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}')
    (tmp_path / "tsconfig.json").write_text("{ // comment\n}")
    (tmp_path / "gone").symlink_to("nowhere")
    for number in range(8):
        (tmp_path / f"latin{number}.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("naïve text".encode("utf-16-le"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("not this")
    with pytest.warns(UserWarning, match=r"Skipped 14 of 18 file\(s\)") as caught:
        assert read(tmp_path) == ["first", "second", "third"]
    said = str(caught[0].message).splitlines()
    assert "  a PNG image: image.png" in said
    assert "  a link to nothing: gone" in said
    assert "  binary data of an unknown format: blob" in said
    assert "  json without the field 'text': package.json" in said
    assert "  JSON that cannot be parsed: tsconfig.json" in said
    names = ", ".join(f"latin{number}.txt" for number in range(8))
    assert f"  text in another encoding, perhaps latin-1: {names}" in said
    assert "  text in another encoding, perhaps utf-16-le: wide.txt" in said


def test_json_can_be_read_as_the_text_it_is(tmp_path):
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}')
    (tmp_path / "a.csv").write_text("n,m\n1,2\n")
    assert read(tmp_path, format="text") == ["n,m\n1,2\n", '{\n "name": "x"\n}']
    with pytest.raises(DataError, match=r"Skipped 2 of 2 file\(s\)"):
        read(tmp_path)


def test_a_damaged_file_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    with pytest.raises(DataError, match=r"cut.txt.gz is damaged"):
        read(tmp_path)


@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1252", "utf-16-le", "utf-32-be", "shift_jis", "cp1251", "koi8-r", "cp500", "utf-16-be"]
)
def test_another_encoding_is_read_when_it_is_named_and_guessed_when_not(tmp_path, encoding):
    text = {
        "shift_jis": "これはテストです。",
        "cp1251": "широкая электрификация",
        "koi8-r": "широкая электрификация",
    }.get(encoding, "Die Größe: naïve “quotes”" if encoding == "cp1252" else "Die Größe, naïve: déjà vu")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    (tmp_path / "c.txt").write_text(text, encoding="utf-16")
    wide = encoding.startswith(("utf", "cp500"))
    (tmp_path / "b.txt").unlink() if wide else None
    assert read(tmp_path, encoding=encoding) == [text] * (2 if wide else 3)
    if encoding != "cp500":
        with pytest.raises(DataError, match=f"--data.train.encoding {encoding}"):
            read(tmp_path / "a.txt")


def test_utf8_with_damage_is_not_called_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("größer, größer, größer".encode() + b"\xff" + "größer".encode())
    with pytest.raises(DataError, match="some bytes are damaged"):
        read(tmp_path / "a.txt")
    with pytest.raises(ConfigurationError, match="'latin-0' is no text encoding"):
        Files(path="a", encoding="latin-0")
    with pytest.raises(ConfigurationError, match="'hex' is no text encoding"):
        Files(path="a", encoding="hex")


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"%PDF-1.7\n", "a PDF document"),
        (b"PK\x03\x04" + b"\0" * 26 + b"word/document.xml", "Word document"),
        (b"PK\x03\x04" + b"\0" * 26 + b"a.txt", "a zip archive"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x80\x04\x95", "a pickle, which could run code"),
        ((80).to_bytes(8, "little") + b'{"w":', "safetensors"),
        (b"\x93NUMPY\x01\0v\0", "a NumPy array.*TokenFiles"),
        (np.arange(9, dtype=np.uint16).tobytes(), "binary data.*TokenFiles"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\0" * 257 + b"ustar\0", "a tar archive"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda data: gzip.compress(gzip.compress(data))])
def test_a_file_that_is_no_text_is_refused_by_its_name(tmp_path, start, name, pack):
    (tmp_path / "a.txt").write_bytes(pack(start))
    name = name if pack in (bytes, gzip.compress) else "compressed twice"
    with pytest.raises(DataError, match=f"a.txt is .*{name}"):
        read(tmp_path / "a.txt")


def test_a_saved_dataset_is_its_data_files_and_one_split(tmp_path):
    train, test = (datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test"))
    train.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"")
    assert read(tmp_path / "one") == ["train"]
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"the splits train, test.* such as .*two/train"):
        read(tmp_path / "two")
    assert read(tmp_path / "two" / "test") == ["test"]
    datasets.DatasetDict(train=train).save_to_disk(tmp_path / "three")
    assert read(tmp_path / "three") == ["train"]


def test_several_paths_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.jsonl").write_text(json.dumps({"text": name}))
    for value in (["a.jsonl", "b.jsonl"], ("a.jsonl", "b.jsonl"), [Path("a.jsonl"), Path("b.jsonl")], "*.jsonl"):
        assert list(as_source(value).documents()) == ["a", "b"]
    for path in (Path("a.jsonl"), [Path("a.jsonl")], "a.jsonl"):
        assert list(Files(path=path).documents()) == ["a"]
    assert as_source(["a.jsonl", "b.jsonl"]).fingerprint != as_source(["a.jsonl"]).fingerprint
    with pytest.raises(DataError, match=r"no file or folder 'c.jsonl'"):
        list(as_source(["a.jsonl", "c.jsonl"]).documents())
    assert list(as_source(["a text", "a.jsonl"]).documents()) == ["a text", "a.jsonl"]
    with pytest.raises(DataError, match="hf download --repo-type dataset roneneldan/TinyStories"):
        list(as_source("roneneldan/TinyStories").documents())
    with pytest.raises(DataError, match="list of files is empty"):
        list(Files(path=()).documents())


def test_links_to_folders_are_followed_once(tmp_path):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    (corpus / "z").mkdir(parents=True)
    other.mkdir()
    (corpus / "z" / "a.txt").write_text("inside")
    (other / "b.txt").write_text("outside")
    (corpus / "link").symlink_to(other)
    (corpus / "again").symlink_to(corpus / "z")
    (corpus / "z" / "loop").symlink_to(corpus)
    assert read(corpus) == ["outside", "inside"]
    assert read(corpus, pattern="*/*.txt") == ["outside", "inside"]
    assert read(corpus, pattern="z/*") == ["inside"]
    with pytest.raises(DataError, match="no file that matches"):
        read(corpus, pattern="*.txt")


@pytest.mark.parametrize("texts", ["letters", b"bytes", {"train": ["a"]}, np.arange(3), pyarrow.table({"text": ["a"]})])
def test_things_whose_items_are_no_texts_are_refused(texts):
    with pytest.raises(DataError, match="is no list of texts"):
        Texts(texts=texts)


def test_bad_records_are_left_out_and_counted_where_that_is_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\noops\n{"text": "b"}\n')
    with pytest.warns(UserWarning, match=r"Dropped 2 bad record\(s\)") as caught:
        assert read(path, on_bad_record="skip") == ["a", "b"]
    assert "line 2: the field 'text' is of type NoneType" in str(caught[0].message)
    assert "line 3 is not JSON" in str(caught[0].message)
    with pytest.warns(UserWarning, match=r"Dropped 1 bad record\(s\) of the texts:\n  item 1: "):
        assert list(Texts(texts=["a", "\ud800"], on_bad_record="skip").documents()) == ["a"]
    with pytest.raises(DataError, match=r"item 1.*lone surrogate"):
        list(Texts(texts=["a", "\ud800"]).documents())


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
        ("a.jsonl", b'{"text": 5}', "is of type int, not text"),
        ("a.jsonl", b"[1]", "got list"),
        ("a.txt.gz", b"no gzip", "damaged or of another kind than its name"),
        ("a.txt.zst", b"no zstandard", "damaged or of another kind than its name"),
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
