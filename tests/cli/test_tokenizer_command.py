"""The verb `lightning-lm tokenizer`: what it writes, prints and refuses."""

import argparse
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lightning_lm.cli.tokenizer import add_arguments, run
from lightning_lm.data import Files
from lightning_lm.tokenizers import UNKNOWN, BPETokenizer, ByteTokenizer, WordTokenizer, load_tokenizer
from lightning_lm.tokenizers.comparison import measure, take_sample


def call(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(list(map(str, words))))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_text("the cat sat <|endoftext|> on the mat\n" * 30, encoding="utf-8")
    (folder / "deep" / "b.py").write_text("def é(): pass\n", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / ".git" / "config").write_text("hidden")
    return folder


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece-bpe", "sentencepiece-unigram", "words", "characters"])
def test_train(corpus: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--input", corpus, "--vocab-size", 290, "--kind", kind, "--output", tmp_path / "t") == 0
    shown = capsys.readouterr()
    assert "from 32 documents" in shown.out
    assert "Skipped 2 of 4 file(s)" in shown.err
    assert "latin.txt" in shown.err
    assert "a PNG image: picture.png" in shown.err
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert "<|endoftext|>" in tokenizer.special_tokens


def test_train_bpe_is_the_same_from_python(corpus: Path, tmp_path: Path) -> None:
    call("train", "--input", corpus, "--vocab-size", 290, "--pattern", "gpt2", "--output", tmp_path / "t")
    texts = list(Files(path=str(corpus)).documents())
    assert load_tokenizer(tmp_path / "t").fingerprint == BPETokenizer.train(texts, 290, pattern="gpt2").fingerprint


def test_train_writes_over_nothing(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--input", corpus, "--vocab-size", 270, "--output", tmp_path / "t"]
    assert call(*words) == 0
    assert call(*words) == 1
    assert "is not empty; choose another --output, or add --overwrite" in capsys.readouterr().err
    assert call(*words, "--overwrite") == 0
    assert call("train", "--input", corpus, "--output", corpus / "a.txt") == 1
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "missing"], "no file or folder"),
        (["--input", "empty"], "has no file that matches"),
        (["--input", "corpus", "--vocab-size", "100"], "vocab_size=100 is too small"),
        (["--input", "corpus", "--pattern", "(a"], "no regular expression"),
        (["--input", "corpus/latin.txt"], r"latin.txt is not UTF-8 text"),
    ],
)
def test_train_says_what_is_wrong(
    corpus: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(corpus.parent)
    (corpus.parent / "empty").mkdir()
    assert call("train", *arguments, "--output", "out") == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1
    assert not Path("out").exists()


def test_compare_prints_a_row_each(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.parent)
    BPETokenizer.train(["the cat sat on the mat"] * 5, 261).save("b")
    WordTokenizer.train(["the cat"], 10).save("w")
    assert call("compare", "--input", "corpus", "bytes", "b", "w") == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row[:5]] for row in rows]
    words = WordTokenizer.train(["the cat"], 10)
    assert cells[0] == ["bytes", "257", "1.000", "0.00%", "yes"]
    assert cells[1][:2] == ["b", "261"]
    assert cells[2][:2] == ["w", "4"]
    assert cells[2][4] == "no"
    ids = [number for text in Files(path=str(corpus)).documents() for number in words.encode(text)]
    assert float(cells[2][3].rstrip("%")) / 100 == pytest.approx(
        ids.count(words.special_tokens[UNKNOWN]) / len(ids), abs=1e-4
    )


def test_compare_says_what_is_wrong(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert call("compare", "--input", corpus / "latin.txt", "bytes") == 1
    assert call("compare", "--input", corpus / "a.txt", tmp_path / "missing") == 1
    assert call("compare", "--input", tmp_path / "empty.txt", "bytes") == 1
    shown = capsys.readouterr().err.splitlines()
    assert [bool(line) for line in shown] == [True, True, True]
    assert "the input is empty" in shown[2]


def test_what_is_measured() -> None:
    words = WordTokenizer.train(["a b"], 10)
    row = measure(words, ["a c b", " b"])
    assert (row.bytes_per_token, row.unknown_rate, row.exact) == (7 / 4, 1 / 4, False)
    assert words.unk_id == words.special_tokens[UNKNOWN]
    row = measure(ByteTokenizer(), ["é"])
    assert (row.vocab_size, row.bytes_per_token, row.unknown_rate, row.exact) == (257, 1, 0, True)


def test_a_sample_ends_in_time() -> None:
    documents = iter(["x" * 1000] * 5)
    assert [len(text) for text in take_sample(documents, max_bytes=1500)] == [1000, 500]
    assert len(list(documents)) == 3
    assert take_sample(["aé", "b"], max_bytes=2) == ["a"]


def test_the_verbs_read_what_fit_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["the cat sat", "on the mat"] * 20
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"body": t}) + "\n" for t in texts).encode())
    )
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "b.parquet")
    words = ["--input", tmp_path, "--field", "body"]
    assert call("train", *words, "--vocab-size", 270, "--output", tmp_path.parent / "t") == 0
    trained = load_tokenizer(tmp_path.parent / "t")
    assert trained.fingerprint == BPETokenizer.train(texts * 2, 270).fingerprint
    assert call("compare", *words, "bytes") == 0
    size = 2 * sum(map(len, texts)) / 1e6
    assert f"{size:,.2f} MB of text, 80 documents" in capsys.readouterr().out
