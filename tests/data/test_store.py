"""A store is checked when it is opened."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest

from lightning_lm.data import TokenStore
from lightning_lm.data.shards import chunks_of, encode_chunks, read_shard
from lightning_lm.data.store import token_dtype, write_shards
from lightning_lm.errors import DataError
from lightning_lm.tokenizers import ByteTokenizer


def test_documents_come_back(numbered_store):
    store = numbered_store([3, 1, 4])
    assert [store[k].tolist() for k in range(3)] == [[1, 2, 3], [4], [5, 6, 7, 8]]
    assert store[-1].tolist() == [5, 6, 7, 8]
    assert (len(store), store.num_tokens, store.eos_id, store.vocab_size) == (3, 8, 0, 9)
    assert pickle.loads(pickle.dumps(store))[1].tolist() == [4]
    store.verify()
    with pytest.raises(IndexError):
        store[3]


def test_ids_take_the_smallest_type_that_holds_them():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_equal_tokens_have_equal_fingerprints_and_others_do_not(numbered_store):
    prints = {numbered_store(lengths).fingerprint for lengths in ([3, 1], [3, 1], [1, 3], [4], [5])}
    assert len(prints) == 4


@pytest.mark.parametrize("name", ["tokens.bin", "index.npy", "meta.json"])
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_file_cut_short_is_noticed(numbered_store, name, keep):
    path = numbered_store([3, 1, 4]).path / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="damaged"):
        TokenStore(path.parent)


@pytest.mark.parametrize("name", ["tokens.bin", "index.npy", "meta.json"])
def test_a_missing_file_is_noticed(numbered_store, name):
    store = numbered_store([3, 1, 4])
    (store.path / name).unlink()
    with pytest.raises(DataError, match=r"damaged|no token store"):
        TokenStore(store.path)


@pytest.mark.parametrize("ends", [[3, 4, 9], [4, 3, 8], [0, 4, 8], [3, 4]])
def test_an_index_that_does_not_fit_is_noticed(numbered_store, ends):
    store = numbered_store([3, 1, 4])
    np.save(store.path / "index.npy", np.array(ends))
    with pytest.raises(DataError, match="index"):
        TokenStore(store.path)


def test_a_foreign_folder_is_no_store(tmp_path, numbered_store):
    with pytest.raises(DataError, match="no token store"):
        TokenStore(tmp_path / "nothing")
    (tmp_path / "meta.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="lacks"):
        TokenStore(tmp_path)
    store = numbered_store([3])
    meta = json.loads((store.path / "meta.json").read_text())
    (store.path / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        TokenStore(store.path)


def test_a_changed_token_is_found_by_verify(numbered_store, tmp_path):
    path = shutil.copytree(numbered_store([300]).path, tmp_path / "copy")
    data = bytearray((path / "tokens.bin").read_bytes())
    data[700] ^= 1
    (path / "tokens.bin").write_bytes(data)
    with pytest.raises(DataError, match="changed"):
        TokenStore(path).verify()


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_no_flipped_bit_is_opened_in_silence(numbered_store, tmp_path):
    whole, choose = numbered_store([300, 40, 7]), random.Random(0)
    for name in ("tokens.bin", "index.npy", "meta.json"):
        found = 0
        for number in range(60):
            path = shutil.copytree(whole.path, tmp_path / f"{name}-{number}")
            flip(path / name, choose.randrange(8 * (path / name).stat().st_size))
            try:
                opened = TokenStore(path)
            except DataError as error:
                assert str(path) in str(error)  # noqa: PT017
                found += 1
            else:  # a blank in a header, or the name of the checksum
                assert {key: opened.meta.get(key) for key in whole.meta if key != "checksum"} == {
                    key: value for key, value in whole.meta.items() if key != "checksum"
                }
                assert np.array_equal(opened.tokens, whole.tokens)
                assert np.array_equal(opened.ends, whole.ends)
        assert found > (30 if name == "index.npy" else 50)


def test_a_store_is_read_once_until_somebody_writes_to_it(numbered_store, tmp_path, monkeypatch):
    path, read = shutil.copytree(numbered_store([300]).path, tmp_path / "copy"), []
    monkeypatch.setattr(
        TokenStore, "verify", lambda self, verify=TokenStore.verify: (read.append(self.path), verify(self))
    )
    for _ in range(3):
        TokenStore(path)
    assert len(read) == 1
    code = f"from lightning_lm.data import TokenStore; TokenStore.verify = None; TokenStore({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)  # another process finds the note
    os.utime(path / "tokens.bin")
    TokenStore(path)
    assert len(read) == 2
    flip(path / "tokens.bin", 99)
    with pytest.raises(DataError, match=r"tokens\.bin or index\.npy has changed.*LIGHTNING_LM_VERIFY=0"):
        TokenStore(path)
    monkeypatch.setenv("LIGHTNING_LM_VERIFY", "0")
    TokenStore(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"dtype": "no such"}, "dtype 'no such'"),
        ({"dtype": None}, "dtype None"),
        ({"num_tokens": "300"}, "num_tokens '300'"),
        ({"num_documents": 0}, "num_documents 0"),
        ({"vocab_size": True}, "vocab_size True"),
        ({"eos_id": 1.5}, r"eos_id 1\.5"),
        ({"fingerprint": ...}, r"lacks \['fingerprint'\]"),
        ({"eos_id": ...}, r"lacks \['eos_id'\]"),
        ([], "is of type list"),
        (7, "is of type int"),
        ([{"format": 2}], "is of type list"),
    ],
)
def test_a_description_of_another_kind_is_named(numbered_store, change, message):
    path = numbered_store([300]).path / "meta.json"
    meta = json.loads(path.read_text())
    if isinstance(change, dict):
        change = {key: value for key, value in {**meta, **change}.items() if value is not ... and key != "checksum"}
    path.write_text(json.dumps(change))
    with pytest.raises(DataError, match=message):
        TokenStore(path.parent)


def test_a_shard_that_was_damaged_is_made_again(tmp_path):
    tokenizer = ByteTokenizer()
    (chunk,) = chunks_of(["some text", "more"], "salt")
    ((path, _),) = encode_chunks([chunk], tokenizer, tmp_path, 1)
    whole = path.read_bytes()
    for place in (3, 12, 20, 30, len(whole) - 1):
        flip(path, 8 * place)
        with pytest.raises(DataError, match="has changed"):
            read_shard(path, np.dtype(np.uint16))
        list(encode_chunks([chunk], tokenizer, tmp_path, 1))
        assert path.read_bytes() == whole


def test_a_store_larger_than_memory_can_be_written(tmp_path):
    """Shards are let go once they are written; the lengths of their documents, which stay, hold on to none of them."""
    path, num_tokens = tmp_path / "shard", 1 << 19
    content = np.int64(num_tokens).tobytes() + np.zeros(num_tokens, np.uint16).tobytes()
    counts = (1).to_bytes(8, "little") + num_tokens.to_bytes(8, "little")
    path.write_bytes(counts + zlib.crc32(content, zlib.crc32(counts)).to_bytes(8, "little") + content)
    meta = {"dtype": "uint16", "vocab_size": 1, "eos_id": None, "num_bytes": 0, "tokenizer": "", "source": ""}
    tracemalloc.start()
    write_shards(tmp_path / "store", (read_shard(path, np.dtype(np.uint16)) for _ in range(16)), meta)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert TokenStore(tmp_path / "store").num_tokens == 16 * num_tokens
    assert peak < 5 << 20  # a shard, and its copy for the file: 1 MiB each, of 16
