"""Whole runs: the same bytes whatever the workers, the division of the input and the kills on the way."""

import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from lightning_lm.curation import Document, Extract, NearDuplicates, Pipeline, Reading, Removed, Report, as_document
from lightning_lm.curation.execution import stages
from lightning_lm.curation.step import Bounds, Filter
from lightning_lm.data import Files
from lightning_lm.errors import CheckpointError, ConfigurationError, DataError

WORDS = (
    "the",
    "model",
    "reads",
    "a",
    "line",
    "of",
    "text",
    "and",
    "says",
    "what",
    "follows",
    "it",
    "in",
    "some",
    "place",
)


class NumWords(Filter):
    """Words of a document, at least twenty."""

    def measures(self, document):
        return {"num_words": float(len(document.text.split()))}

    def bounds(self):
        return {"num_words": Bounds(minimum=20)}


class SameText:
    """Exact deduplication as a corpus step, the simplest there is."""

    def summarize(self, documents):
        digests = [hashlib.sha256(document.text.encode()).hexdigest() for document in documents]
        return {"digests": np.array(digests, "S64"), "ids": np.array([document.id for document in documents], "S36")}

    def decide(self, summaries):
        first = {}
        for summary in summaries:
            for digest, identifier in zip(summary["digests"], summary["ids"], strict=True):
                first[digest] = min(first.get(digest, identifier), identifier)
        return {"kept": np.array(sorted(first.values()), "S36")}

    def apply(self, document, decision):
        kept = decision["kept"]
        place = np.searchsorted(kept, document.id.encode())
        same = place < len(kept) and kept[place] == document.id.encode()
        return document if same else Removed(document, "same_text")


def shout(document: Document) -> Document:
    return Document(document.id, document.text.upper(), document.url, document.metadata)


def records(count: int = 300) -> list[str]:
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(count)]
    return [*texts, *texts[:40]]


def write(folder: Path, texts: list[str], files: int) -> Path:
    folder.mkdir()
    for number in range(files):
        lines = [json.dumps({"text": text, "kind": len(text) % 3}) for text in texts[number::files]]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(source, output: Path, workers: int = 1, **settings) -> Report:
    steps = [NumWords(), SameText(), shout]
    return Pipeline(steps).run(source, output, num_workers=workers, shard_bytes=9000, show_progress=False, **settings)


def test_the_output_depends_on_the_documents_alone(tmp_path):
    texts = records()
    first = run(write(tmp_path / "one", texts, 1), tmp_path / "clean")
    shuffled = random.Random(2).sample(texts, len(texts))
    run(write(tmp_path / "many", shuffled, 5), tmp_path / "again", workers=3)
    expected, found = content(tmp_path / "clean"), content(tmp_path / "again")
    for manifest in (expected, found):
        del manifest["manifest.json"], manifest["SHA256SUMS"]  # the first has the digest of the input's files
    assert found == expected
    long = [text for text in texts if len(text.split()) >= 20]
    lines = [json.loads(line) for name in first.files for line in (tmp_path / "clean" / name).read_text().splitlines()]
    assert sorted(line["text"] for line in lines) == sorted({text.upper() for text in long})
    assert [line["id"] for line in lines] == sorted(line["id"] for line in lines)
    assert len(first.files) > 2
    assert all(line["metadata"] == {"kind": len(line["text"]) % 3} for line in lines)


def test_the_report_counts_every_document(tmp_path):
    texts = records()
    report = run(write(tmp_path / "in", texts, 2), tmp_path / "clean")
    words, same, shouting = report.steps
    short = sum(len(text.split()) < 20 for text in texts)
    assert (report.documents_read, words.reasons) == (340, {"num_words": short})
    assert words.bytes_in == sum(map(len, texts))
    assert same.documents_in == 340 - short == same.documents_out + same.reasons["same_text"]
    assert shouting.changed == shouting.documents_in == report.documents_kept
    histogram = words.histograms["num_words"]
    assert (sum(histogram.counts), histogram.minimum) == (340, 20)
    assert len(words.removed["num_words"]) == 10 == len(words.kept)
    assert all(sample["value"] < 20 == sample["limit"] for sample in words.removed["num_words"])
    assert Report.read(tmp_path / "clean").steps[0].reasons == words.reasons
    assert "<script" not in (tmp_path / "clean" / "report.html").read_text()


def test_the_report_shows_clusters_of_duplicates_side_by_side(tmp_path):
    words = [f"word{number}" for number in range(200)]
    copies = [" ".join([*words[:150], f"changed{number}", *words[151:]]) for number in range(4)]
    single = " ".join(reversed(words))
    report = Pipeline([NearDuplicates()]).run([*copies, single], tmp_path / "clean", num_workers=1, shard_bytes=3000)
    (samples,) = report.steps[0].removed.values()
    assert len(samples) == 3 == {sample["num_copies"] for sample in samples}.pop()
    for sample in samples:
        shown = [sample, sample["kept"], *sample["copies"]]
        assert sorted(document["text"] for document in shown) == sorted(copies)
    page = (tmp_path / "clean" / "report.html").read_text()
    kept = samples[0]["kept"]["text"].split()[150]
    marked = re.findall("<mark>(.*?)</mark>", page)
    assert sorted([*marked, kept]) == [f"changed{number}" for number in range(4)]
    assert page.count("3 copies removed") == 1


def test_training_reads_the_output_and_nothing_beside_it(tmp_path):
    report = run(write(tmp_path / "in", records(), 1), tmp_path / "clean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(Files(path=str(tmp_path / "clean")).documents())) == report.documents_kept
    (tmp_path / "clean" / report.files[1]).unlink()
    with pytest.raises(DataError, match=rf"{report.files[1]} is missing.*Curate the corpus again"):
        list(Files(path=str(tmp_path / "clean")).documents())


def test_a_finished_output_is_kept_and_a_missing_file_written_again(tmp_path):
    source = write(tmp_path / "in", records(), 1)
    report = run(source, tmp_path / "clean")
    before, name = content(tmp_path / "clean"), report.files[1]
    time = (tmp_path / "clean" / name).stat().st_mtime_ns
    run(source, tmp_path / "clean")
    assert (tmp_path / "clean" / name).stat().st_mtime_ns == time
    (tmp_path / "clean" / name).unlink()
    run(source, tmp_path / "clean")
    assert content(tmp_path / "clean") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "in"]


def test_another_output_is_replaced_on_demand_only(tmp_path):
    source = write(tmp_path / "in", records(), 1)
    run(source, tmp_path / "clean")
    with pytest.raises(ConfigurationError, match=r"other steps.*--overwrite"):
        Pipeline([shout]).run(source, tmp_path / "clean", num_workers=1, show_progress=False)
    Pipeline([shout]).run(source, tmp_path / "clean", num_workers=1, show_progress=False, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigurationError, match="no output of a curation"):
        run(source, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("source", [records(), lambda: iter(records()), iter(records()), [as_document("a " * 30)]])
def test_texts_and_documents_in_memory_are_sources_too(source, tmp_path):
    report = run(source, tmp_path / "clean")
    assert report.documents_read in (1, 340)
    assert report.documents_kept == report.steps[-1].documents_out > 0


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    """Each process of this test is forked, dies after a number of finished parts, and leaves them to the next."""
    source = write(tmp_path / "in", records(), 3)
    run(source, tmp_path / "expected")
    deaths = 0
    for parts in (0, 1, 2, 3, 5, 50):
        child = os.fork()
        if child == 0:
            _die_after(parts)
            run(source, tmp_path / "clean")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        deaths += os.WIFSIGNALED(status)
    assert deaths >= 4
    assert content(tmp_path / "clean") == content(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "expected", "in"]


def _die_after(parts: int) -> None:
    rename, left = stages.rename, [parts]

    def counted(source, target):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    stages.rename = counted


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    source = write(tmp_path / "in", records(), 1)
    script = "import sys; from pathlib import Path; from lightning_lm.storage import held\n"
    script += "with held(Path(sys.argv[1]), 'x'): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "clean.partial")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigurationError, match=f"in use by process {other.pid}.*choose another output"):
            run(source, tmp_path / "clean")
        other.stdin.close()


def test_an_error_of_a_step_names_the_step_and_the_document(tmp_path):
    def fails(document):
        raise ZeroDivisionError("by nothing")

    with pytest.raises(ZeroDivisionError) as caught:
        Pipeline([fails]).run(write(tmp_path / "in", records(3), 1), tmp_path / "clean", num_workers=1)
    assert "in the step fails, at the document" in caught.value.__notes__[0]
    with pytest.raises(ConfigurationError, match="step <lambda> returned NoneType"):
        Pipeline([lambda document: None]).run(tmp_path / "in", tmp_path / "clean", num_workers=1)
    with pytest.raises(ConfigurationError, match=r"write Extract\(\)"):
        Pipeline([Extract])


def test_input_without_documents_names_the_reasons(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)
    (tmp_path / "in" / "empty.txt").touch()
    with pytest.raises(DataError, match=r"no document(.|\n)*1 x a PNG image: .*image.png(.|\n)*1 x empty file"):
        run(tmp_path / "in", tmp_path / "clean")
    with pytest.raises(DataError, match="no document"):
        run([], tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


def test_a_gzip_bomb_is_left_out_with_the_remedy(tmp_path):
    (tmp_path / "in").mkdir()
    with gzip.open(tmp_path / "in" / "bomb.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(80):
            file.write(b"0" * (1 << 20))
    (tmp_path / "in" / "good.txt").write_text("a " * 30)
    reading = Reading(max_document_bytes=10_000_000)
    report = Pipeline([shout], reading).run(tmp_path / "in", tmp_path / "clean", num_workers=1, show_progress=False)
    assert report.documents_kept == 1
    assert "--reading.max_expansion" in report.examples["file that cannot be read"][0][1]


def test_a_flipped_bit_of_the_output_is_found_when_it_is_read(tmp_path, monkeypatch):
    report = run(write(tmp_path / "in", records(), 2), tmp_path / "clean")
    part = tmp_path / "clean" / report.files[0]
    assert len([*Files(path=tmp_path / "clean").documents()]) == report.documents_kept
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{part.name} has changed since it was written"):
        [*Files(path=tmp_path / "clean").documents()]
    monkeypatch.setenv("LIGHTNING_LM_VERIFY", "0")
    assert len([*Files(path=tmp_path / "clean").documents()]) == report.documents_kept
