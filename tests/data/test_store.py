"""A store is checked when it is opened."""

import json
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest

from lightning_lm.data import TokenStore
from lightning_lm.data.shards import read_shard
from lightning_lm.data.store import token_dtype, write_shards
from lightning_lm.errors import DataError


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


def test_a_store_larger_than_memory_can_be_written(tmp_path):
    """Shards are let go once they are written; the lengths of their documents, which stay, hold on to none of them."""
    path, num_tokens = tmp_path / "shard", 1 << 19
    header = (1).to_bytes(8, "little") + num_tokens.to_bytes(8, "little")
    path.write_bytes(header + np.int64(num_tokens).tobytes() + np.zeros(num_tokens, np.uint16).tobytes())
    meta = {"dtype": "uint16", "vocab_size": 1, "eos_id": None, "num_bytes": 0, "tokenizer": "", "source": ""}
    tracemalloc.start()
    write_shards(tmp_path / "store", (read_shard(path, np.dtype(np.uint16)) for _ in range(16)), meta)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert TokenStore(tmp_path / "store").num_tokens == 16 * num_tokens
    assert peak < 5 << 20  # a shard, and its copy for the file: 1 MiB each, of 16
