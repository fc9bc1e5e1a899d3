"""Records and where they stand: every format by its content, and every error by its place."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lightning_lm.data import Files
from lightning_lm.data.records import BadRecords, read_records
from lightning_lm.errors import DataError

RECORDS = [{"text": "one", "n": 1}, {"text": "zwei\nlines", "n": 2}, {"text": "drei 😀", "n": 3}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
TEXTS = [record["text"] for record in RECORDS]
PACKERS = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress}


def read(path, **how):
    return list(Files(path=str(path), **how).documents())


def arrow_stream(path):
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def arrow_file(path):
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


FORMATS = {
    "lines": lambda path: path.write_bytes(LINES),
    "lines in UTF-16": lambda path: path.write_text(LINES.decode(), encoding="utf-16"),
    "array": lambda path: path.write_text(json.dumps(RECORDS)),
    "array over lines": lambda path: path.write_text(json.dumps(RECORDS, indent=2)),
    "objects over lines": lambda path: path.write_text("\n".join(json.dumps(r, indent=2) for r in RECORDS)),
    "objects side by side": lambda path: path.write_text("".join(map(json.dumps, RECORDS))),
    "parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path),
    "arrow stream": arrow_stream,
    "arrow file": arrow_file,
    **{name: (lambda path, pack=pack: path.write_bytes(pack(LINES))) for name, pack in PACKERS.items()},
}


@pytest.mark.parametrize("name", ["data", "c4-train.00000-of-01024.json", "x.txt"])
@pytest.mark.parametrize("kind", FORMATS)
def test_records_are_told_by_content_whatever_their_name(tmp_path, kind, name):
    FORMATS[kind](tmp_path / name)
    assert read(tmp_path / name) == TEXTS
    assert [record for _, record in read_records(tmp_path / name)] == RECORDS


def test_text_that_begins_with_a_bracket_is_text(tmp_path):
    for text in (
        "[1] Smith et al.\n[2] Doe",
        "{\\bf bold}",
        "[INFO] {}",
        '{"title": "x"}\n\nbody\nand more',
        "{{Infobox}}\n",
        "{a: 1}",
        '{"cut',
        "[",
        "{",
    ):
        (tmp_path / "a").write_text(text)
        assert read(tmp_path / "a") == [text]


def test_a_saved_dataset_gives_its_texts(tmp_path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert read(file) == TEXTS


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_packed_file_that_was_cut_anywhere_is_an_error_that_names_it(tmp_path, packer, name):
    data, path = PACKERS[packer](LINES), tmp_path / f"{name}.{packer}"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"{name}.{packer} is damaged"):
            read(path)


def test_streams_that_follow_each_other_are_one_file_and_its_last_may_not_be_cut(tmp_path):
    for packer, pack in PACKERS.items():
        path = tmp_path / f"a.jsonl.{packer}"
        path.write_bytes(pack(LINES) + pack(LINES))
        assert read(path) == TEXTS * 2
        path.write_bytes((pack(LINES) + pack(LINES))[:-5])
        with pytest.raises(DataError, match="ends in the middle"):
            read(path)
        path.write_bytes(pack(LINES) + b"garbage")
        with pytest.raises(DataError, match="is damaged"):
            read(path)


def test_zstandard_with_a_long_window_and_skippable_frames(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    (tmp_path / "a.zst").write_bytes(skippable + packed.compress(LINES) + packed.flush())
    assert read(tmp_path / "a.zst") == TEXTS


ARRAYS = {
    '[{"text": "a"}, {"text": bad}, {"text": "b"}]': ["a", "b"],
    '[{"text": "a"},, {"text": "b"}]': ["a", "b"],
    '[{"text": "a"}, {text: "q, ] } {"}, {"n": 1,}, {"text": "b"}]': ["a", "b"],
    '[{"text": "a"}, {\'text\': 1}]': ["a"],
    '[{"text": "a"}, {"text": "x}, {"text": "y"}, {"text": "b"}]': None,  # where the broken text ends nobody can tell
    '[{"text": "a"}, {"text": [1, 2}, {"text": "b"}]': None,
    '[{"text": "a"}, {"text": "b"': None,
}


@pytest.mark.parametrize("content", ARRAYS)
def test_a_broken_element_of_an_array_is_skipped_if_its_end_can_be_told(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"a\.json, record 2 is not JSON"):
        read(path)
    if ARRAYS[content] is None:
        with pytest.raises(DataError, match=r"a\.json, record 2 is not JSON"):
            read(path, on_bad_record="skip")
        return
    with pytest.warns(UserWarning, match=r"(?s)Dropped \d bad record\(s\) of .*a\.json, record 2 is not JSON"):
        assert read(path, on_bad_record="skip") == ARRAYS[content]


def test_places_count_as_editors_and_parquet_tools_do(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n{"n": 2}\n')
    (tmp_path / "b.json").write_text('[{"n": 1}, {"n": 2}]')
    table = pyarrow.table({"n": list(range(5))})
    pyarrow.parquet.write_table(table, tmp_path / "c", row_group_size=3)
    (tmp_path / "d.csv").write_text('n,text\n1,"a\nb"\n2,c\n')
    places = {path.name: [place.where for place, _ in read_records(path)] for path in tmp_path.iterdir()}
    assert places == {
        "a.jsonl": ["line 1", "line 3"],
        "b.json": ["record 1", "record 2"],
        "c": [f"row group 0, row {n}" for n in range(3)] + [f"row group 1, row {n}" for n in range(2)],
        "d.csv": ["line 2", "line 4"],
    }
    assert read(tmp_path / "d.csv") == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "\\ud800"}', "field 'text': the text has a lone surrogate, U+D800, at character 0"),
        ('{"text": null}', "the field 'text' is of type NoneType"),
        ('{"text": ["a"]}', "the field 'text' is of type list"),
        ("{}", "has no field 'text'"),
        ("7", "got int"),
        ('{"text": "cut', "is not JSON"),
        ('{"text": ' + "[" * 100_000, "is not JSON (nested too deep)"),
        ('{"text": ' + "1" * 6000 + "}", "is not JSON (Exceeds the limit (4300 digits)"),
    ],
)
def test_a_bad_record_is_named_or_skipped(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n\n' + line + '\n{"text": "last"}\n')
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"{path}, line 3" in str(caught.value)
    assert message in str(caught.value)
    bad = BadRecords("skip")
    kept = [record for _, record in read_records(path, bad)]
    assert kept[0] == {"text": "first"}
    assert kept[-1] == {"text": "last"}


def test_skipped_records_are_counted_with_their_places():
    bad = BadRecords("skip")
    for number in range(5):
        bad.add(DataError(f"a.jsonl, line {number}: no text"))
    with pytest.warns(UserWarning, match=r"Dropped 5 bad record\(s\) of a.jsonl:\n  a.jsonl, line 0: no text\n.*"):
        bad.report("a.jsonl")


def test_an_array_larger_than_a_block_is_read_value_by_value(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_lm.data.unpacking._BLOCK", 7)
    monkeypatch.setattr("lightning_lm.data.unpacking._PACKED_BLOCK", 7)
    for name, text in (("a.json", json.dumps([*RECORDS, {"n": 12345678901234567890}])), ("b.json", "[]")):
        (tmp_path / name).write_text(text)
        assert [record for _, record in read_records(tmp_path / name)] == json.loads(text)
    for cut in ('[{"n": 1}', '[{"n": 1},', '[{"n": 1} {"n": 2}]', '[{"n": 1'):
        (tmp_path / "a.json").write_text(cut)
        with pytest.raises(DataError, match=r"a.json"):
            list(read_records(tmp_path / "a.json"))
