"""Rows: each token a target once an epoch, nothing across documents, any row found alone."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lm.data import BestFit, Concatenate, OnePerRow, TokenStream, tokenize
from lightning_lm.data import packed_rows as rows_module
from lightning_lm.errors import ConfigurationError, DataError, FingerprintError

PACKINGS = [BestFit(), Concatenate(), OnePerRow()]
ids = [type(packing).__name__ for packing in PACKINGS]


def check_row(row, store):
    """Check a row against the corpus, in which token k is the number k + 1; return its targets."""
    begins = {0 if k == 0 else int(store.ends[k - 1]) for k in range(len(store))}
    tokens, labels, positions, documents = (
        row[name].tolist() for name in ("input_ids", "labels", "position_ids", "document_ids")
    )
    targets = []
    assert labels[0] == -100
    for t in range(len(tokens)):
        new = t == 0 or documents[t] != documents[t - 1]
        assert new or documents[t] == documents[t - 1]
        assert positions[t] == (0 if new else positions[t - 1] + 1)
        assert not new or labels[t] == -100
        if labels[t] != -100:
            assert labels[t] == tokens[t]
            assert tokens[t - 1] == (0 if store.eos_id == 0 and tokens[t] - 1 in begins else tokens[t] - 1)
            targets.append(tokens[t])
    assert documents == sorted(documents)
    return targets


@pytest.mark.parametrize("with_eos", [True, False], ids=["eos", "no eos"])
@pytest.mark.parametrize("packing", PACKINGS, ids=ids)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25), row_length=st.integers(2, 17), seed=st.integers(0)
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_token_is_a_target_exactly_once_an_epoch(numbered_store, packing, with_eos, lengths, row_length, seed):
    store = numbered_store([*lengths, 2], with_eos=with_eos)
    firsts = {1 if k == 0 else int(store.ends[k - 1]) + 1 for k in range(len(store))}
    wanted = sorted(set(range(1, store.num_tokens + 1)) - (set() if with_eos else firsts))
    stream = TokenStream(store, row_length=row_length, packing=packing, seed=seed)
    assert stream.num_targets == len(wanted)
    for epoch in (0, 1, 7):
        first = epoch * stream.rows_per_epoch
        found = [token for k in range(stream.rows_per_epoch) for token in check_row(stream[first + k], store)]
        assert sorted(found) == wanted


def test_windows_shuffle_like_one_and_rows_are_found_alone(numbered_store, monkeypatch):
    monkeypatch.setattr(rows_module, "_WINDOW", 16)
    monkeypatch.setattr(rows_module, "_BLOCK", 8)
    store = numbered_store(np.random.default_rng(0).integers(1, 40, 100).tolist())
    stream = TokenStream(store, row_length=17, seed=3)
    epochs = []
    for epoch in range(3):
        rows = stream.batch(np.arange(epoch * stream.rows_per_epoch, (epoch + 1) * stream.rows_per_epoch))
        targets = rows["labels"][rows["labels"] != -100]
        assert sorted(targets.tolist()) == list(range(1, store.num_tokens + 1))
        epochs.append(rows["input_ids"].tolist())
    assert epochs[0] != epochs[1] != epochs[2]
    again = TokenStream(store, row_length=17, seed=3)
    for k in (2 * stream.rows_per_epoch + 5, 3, stream.rows_per_epoch - 1, 10**9):
        assert again[k]["input_ids"].tolist() == stream.batch(np.array([k]))["input_ids"][0].tolist()
        if k < 3 * stream.rows_per_epoch:
            epoch, place = divmod(k, stream.rows_per_epoch)
            assert again[k]["input_ids"].tolist() == epochs[epoch][place]


def test_unshuffled_rows_keep_the_order_of_the_store(numbered_store):
    store = numbered_store([5, 9, 3, 8])
    stream = TokenStream(store, row_length=9, packing=Concatenate(), shuffle=False)
    labels = np.concatenate([stream[k]["labels"] for k in range(stream.rows_per_epoch)])
    assert labels[labels != -100].tolist() == list(range(1, 26))
    assert stream[0]["labels"].tolist() == stream[stream.rows_per_epoch]["labels"].tolist()


def test_another_seed_gives_another_order_and_fingerprint(numbered_store):
    store = numbered_store([7] * 50)
    streams = [TokenStream(store, row_length=8, seed=seed) for seed in (0, 1)]
    assert len({stream.fingerprint for stream in streams}) == 2
    assert streams[0][0]["input_ids"].tolist() != streams[1][0]["input_ids"].tolist()
    changed = [
        TokenStream(store, row_length=9),
        TokenStream(store, row_length=8, packing=Concatenate()),
        TokenStream(store, row_length=8, packing=BestFit(long="drop")),
        TokenStream(store, row_length=8, shuffle=False),
        TokenStream(numbered_store([7] * 51), row_length=8),
    ]
    assert len({stream.fingerprint for stream in [*streams, *changed]}) == 7
    assert TokenStream(numbered_store([7] * 50), row_length=8).fingerprint == streams[0].fingerprint


def test_a_mixture_gives_each_store_its_share_and_all_of_it(numbered_store):
    large, small = numbered_store([4] * 300), numbered_store([3] * 20)
    stream = TokenStream({large: 0.75, small: 0.25}, row_length=5, packing=OnePerRow())
    rows = stream.batch(np.arange(400))
    from_large = (rows["labels"] != -100).sum(axis=1) == 4
    assert from_large.sum() == 300
    for n in range(1, 401):
        assert abs(from_large[:n].sum() - 0.75 * n) < 1
    seen = rows["labels"][from_large]
    assert sorted(seen[seen != -100].tolist()) == list(range(1, 1201))
    of_small = rows["labels"][~from_large]
    assert np.bincount(of_small[of_small != -100])[1:].tolist() == [5] * 60


def test_padding_is_a_document_of_its_own_in_which_nothing_is_learned(numbered_store):
    row = TokenStream(numbered_store([3]), row_length=10)[0]
    assert row["labels"].tolist() == [-100, 1, 2, 3] + [-100] * 6
    assert row["document_ids"].tolist() == [0] * 4 + [1] * 6
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert {values.dtype for values in row.values()} == {np.dtype(np.int64)}


def test_streams_travel_to_worker_processes(numbered_store):
    stream = TokenStream(numbered_store([5, 9, 3, 8]), row_length=9)
    assert pickle.loads(pickle.dumps(stream))[5]["input_ids"].tolist() == stream[5]["input_ids"].tolist()


def test_what_gives_no_row_is_an_error_that_says_why(numbered_store):
    with pytest.raises(DataError, match="no row"):
        TokenStream(numbered_store([50, 60]), row_length=9, packing=BestFit(long="drop"))
    with pytest.raises(DataError, match="1 token"):
        TokenStream(numbered_store([1], with_eos=False), row_length=9)
    with pytest.raises(ConfigurationError, match="at least 2"):
        TokenStream(numbered_store([50]), row_length=1)


@dataclasses.dataclass
class Letters:
    """Ids of the letters a, b, ...; a begin that is not the end."""

    vocab_size = 4
    fingerprint = "letters"
    eos_id: int | None = 3
    bos_id: int | None = 2

    def encode_batch(self, texts):
        return [np.array(["ab".index(letter) for letter in text.split()], dtype=np.uint16) for text in texts]


@pytest.mark.parametrize(
    ("bos_id", "eos_id", "row", "targets"),
    [
        (2, 3, [2, 0, 1, 3, 2, 1, 3], 5),  # as fine-tuning and generation begin a text
        (None, 3, [3, 0, 1, 3, 3, 1, 3], 5),
        (3, 3, [3, 0, 1, 3, 3, 1, 3], 5),
        (2, None, [2, 0, 1, 2, 1], 3),
    ],
)
def test_documents_begin_as_the_tokenizer_begins_a_text(tmp_path, bos_id, eos_id, row, targets):
    store = tokenize(["a b", "b"], Letters(eos_id, bos_id), tmp_path / "store", show_progress=False)
    stream = TokenStream(store, row_length=len(row), shuffle=False)
    assert stream[0]["input_ids"].tolist() == row
    assert stream.num_targets == targets
    store.verify()


def test_stores_that_begin_documents_otherwise_are_not_the_same(tmp_path):
    stores = {bos: tokenize(["a b"], Letters(3, bos), tmp_path / str(bos), show_progress=False) for bos in (None, 2, 3)}
    assert stores[2].fingerprint != stores[3].fingerprint == stores[None].fingerprint
    with pytest.raises(FingerprintError):
        tokenize(["a b"], Letters(3, 2), tmp_path / "None", show_progress=False)


def test_what_a_published_tokenizer_puts_before_a_text_begins_a_row(tmp_path):
    tokenizer = Letters()
    tokenizer.prefix_ids = [1, 0]
    store = tokenize(["a b"], tokenizer, tmp_path / "store", show_progress=False)
    assert TokenStream(store, row_length=4)[0]["input_ids"].tolist() == [0, 0, 1, 3]


def test_an_array_is_no_store_and_the_way_to_one_is_named():
    with pytest.raises(ConfigurationError, match=r"ndarray is no token store.*write_store"):
        TokenStream(np.arange(100), row_length=8)
