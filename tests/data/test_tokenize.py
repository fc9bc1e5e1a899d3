"""Tokenizing: once, in parallel, and not harmed by kills and full disks."""

import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from lightning_lm.data import Texts, TokenStore, tokenize
from lightning_lm.data import shards as shards_module
from lightning_lm.errors import DataError, FingerprintError, TokenizerError

TEXTS = [f"document {k}: " + "ab" * (k % 37) for k in range(400)]


class Bytes:
    """One token a byte, and 256 at the end. Counts what it is asked to encode."""

    vocab_size, eos_id, special_tokens = 257, 256, {}

    def __init__(self, fingerprint="bytes", before=lambda texts: None):
        self.fingerprint, self._before = fingerprint, before
        self.encoded = 0

    def encode_batch(self, texts):
        self._before(texts)
        self.encoded += len(texts)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(shards_module, "_CHUNK_BYTES", 1000)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "store"


def check(store, texts=TEXTS):
    assert [bytes(store[k][:-1].astype(np.uint8)).decode() for k in range(len(store))] == list(texts)
    assert {int(store[k][-1]) for k in range(len(store))} == {256}
    assert store.num_bytes == sum(len(text.encode()) for text in texts)
    store.verify()


def quietly(texts, tokenizer, out, **how):
    return tokenize(texts, tokenizer, out, show_progress=False, **{"num_workers": 1, **how})


def forked(child):
    """Start a function in a forked process; return what waits for it and tells its exit status, or minus the signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads at a fork
        pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        finally:
            os._exit(70)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_any_number_of_processes_gives_the_same_store(tmp_path):
    stores = [quietly(TEXTS, Bytes(), tmp_path / str(n), num_workers=n) for n in (1, 2, 3)]
    for store in stores:
        check(store)
    assert len({store.fingerprint for store in stores}) == 1


def test_the_second_call_opens_what_the_first_one_wrote(out):
    first = quietly(TEXTS, Bytes(), out)
    tokenizer = Bytes()
    assert quietly(TEXTS, tokenizer, out).fingerprint == first.fingerprint
    assert tokenizer.encoded == 0
    assert [path.name for path in out.parent.iterdir()] == ["store"]


def test_another_text_or_tokenizer_is_not_mistaken_for_it(out):
    quietly(TEXTS, Bytes(), out)
    with pytest.raises(FingerprintError, match="another text"):
        quietly(TEXTS[1:], Bytes(), out)
    with pytest.raises(FingerprintError, match="another tokenizer"):
        quietly(TEXTS, Bytes("other"), out)
    check(quietly(TEXTS[1:], Bytes(), out, overwrite=True), TEXTS[1:])


def test_a_damaged_store_is_written_anew_when_asked(out):
    quietly(TEXTS, Bytes(), out)
    (out / "tokens.bin").write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        quietly(TEXTS, Bytes(), out)
    check(quietly(TEXTS, Bytes(), out, overwrite=True))


def test_a_generator_is_read_once_and_a_path_as_often_as_needed(out, tmp_path):
    check(quietly((text for text in TEXTS), Bytes(), out))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(TEXTS))
    check(quietly(str(tmp_path / "a.txt"), Bytes(), tmp_path / "other"))


def test_no_text_is_an_error(out):
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="empty"):
            quietly(texts, Bytes(), out)
    assert not out.exists()


def test_one_byte_is_enough(out):
    check(quietly(["x"], Bytes(), out), ["x"])


def test_without_end_of_text_documents_follow_each_other(out):
    tokenizer = Bytes()
    tokenizer.eos_id = None
    store = quietly(["ab", "c"], tokenizer, out)
    assert store.tokens.tolist() == [97, 98, 99]
    assert store.ends.tolist() == [2, 3]


def test_ids_beyond_the_vocabulary_are_refused(out):
    tokenizer = Bytes()
    tokenizer.vocab_size = 100
    with pytest.raises(TokenizerError, match="id 117"):
        quietly(TEXTS, tokenizer, out)
    assert not out.exists()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_was_finished_before_a_failure_is_not_done_again(out, num_workers):
    def fail(texts):
        if TEXTS[250] in texts:
            raise DataError("stop here")

    with pytest.raises(DataError, match="stop here"):
        quietly(TEXTS, Bytes(before=fail), out, num_workers=num_workers)
    tokenizer = Bytes()
    check(quietly(TEXTS, tokenizer, out))
    assert 0 < tokenizer.encoded <= 200


def test_killed_at_any_file_operation_it_goes_on(out):
    """Kill -9 before the n-th operation on a file, for n from 1 until none is left."""
    out.parent.joinpath("text").write_text("<|endoftext|>".join(TEXTS[:60]))
    source = str(out.parent / "text")
    kills = 0

    def child():
        left = [kills]

        def count(event, arguments):
            if event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"} and "store" in str(arguments[0]):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(count)
        quietly(source, Bytes(), out)

    while True:
        status = forked(child)()
        assert status in (0, -signal.SIGKILL)
        if out.exists():
            check(TokenStore(out), TEXTS[:60])
        if status == 0:
            break
        kills += 1
        if kills % 3 == 0:
            check(quietly(source, Bytes(), out), TEXTS[:60])
            for path in sorted(out.parent.rglob("*store*/*"), reverse=True):
                path.unlink()
            out.rmdir()
    assert kills > 15


def test_killed_with_its_workers_at_work_none_stays_and_all_goes_on(out):
    reader, writer = os.pipe()

    def child():
        os.close(reader)
        main = os.getpid()

        def kill_main(texts):
            if TEXTS[300] in texts:
                os.kill(main, signal.SIGKILL)

        quietly(TEXTS, Bytes(before=kill_main), out, num_workers=2)

    assert forked(child)() == -signal.SIGKILL
    os.close(writer)
    assert os.read(reader, 1) == b"", "ends when the last process that inherited the other end has ended"
    os.close(reader)
    assert not out.exists()
    tokenizer = Bytes()
    check(quietly(TEXTS, tokenizer, out))
    assert tokenizer.encoded < len(TEXTS)


def test_a_killed_worker_is_reported(out):
    def kill(texts):
        if TEXTS[300] in texts:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match="was killed, perhaps because memory ran out"):
        quietly(TEXTS, Bytes(before=kill), out, num_workers=2)
    check(quietly(TEXTS, Bytes(), out, num_workers=2))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("limit", [500, 20_000])
def test_a_full_disk_is_named_and_leaves_no_store(out, num_workers, limit):
    """A limit on file sizes stops the shards (500 bytes), or the store that is put together (20 kB)."""

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(DataError, match="The disk is full"):
            quietly(TEXTS, Bytes(), out, num_workers=num_workers)

    assert forked(child)() == 0
    assert not out.exists()
    tokenizer = Bytes()
    check(quietly(TEXTS, tokenizer, out))
    assert (tokenizer.encoded == len(TEXTS)) == (limit == 500)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        quietly(TEXTS, Bytes(), tmp_path / "file" / "store")


def test_two_processes_at_once_write_one_store(out):
    wait = forked(lambda: check(quietly(TEXTS, Bytes(), out)))
    check(quietly(TEXTS, Bytes(), out))
    assert wait() == 0
    check(TokenStore(out))


def test_progress_goes_to_standard_error(out, capsys):
    tokenize(Texts(texts=TEXTS), Bytes(), out, num_workers=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "MB/s" in captured.err
    assert Path(out).exists()


def test_a_source_that_cannot_be_read_is_named(out):
    class Vanished(Texts):
        def documents(self):
            yield "one document"
            raise PermissionError(13, "Permission denied", "secret.txt")

    with pytest.raises(DataError, match=r"secret\.txt cannot be read: Permission denied"):
        tokenize(Vanished(texts=("x",)), Bytes(), out)
    assert not out.exists()
