"""Token ids that exist already: every format against files written here by its own rules."""

import json
import struct

import numpy as np
import pytest
import zstandard

from lightning_lm.data import Split, TokenFiles, TokenStream, hold_out, tokenize, write_store
from lightning_lm.datamodules import TextDataModule
from lightning_lm.datamodules.loader import Loading
from lightning_lm.errors import DataError
from lightning_lm.parts import Part
from lightning_lm.tokenizers import ByteTokenizer

EOS = 256
TEXTS = ["one", "two and", "three"]
DOCUMENTS = [list(text.encode()) for text in TEXTS]
FLAT = [number for document in DOCUMENTS for number in [*document, EOS]]


def numpy_flat(folder):
    np.save(folder / "a.npy", np.array(FLAT, dtype=np.int64))
    return TokenFiles(path=str(folder / "a.npy"))


def nanogpt(folder):
    np.array(FLAT, dtype=np.uint16).tofile(folder / "train.bin")
    return TokenFiles(path=str(folder / "train.bin"), dtype="uint16")


def megatron(folder, documents=DOCUMENTS, path="data_text_document"):
    lengths = [len(document) + 1 for document in documents]
    with (folder / "data_text_document.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1))
        file.write(np.array(lengths, dtype="<i4").tobytes())
        file.write((np.cumsum([0, *lengths[:-1]]) * 2).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    np.array(FLAT, dtype="<u2").tofile(folder / "data_text_document.bin")
    return TokenFiles(path=str(folder / path))


def litdata(folder, pack=None):
    chunks = [DOCUMENTS[:2], DOCUMENTS[2:]]
    for number, documents in enumerate(chunks):
        items = [np.array([*document, EOS], dtype="<i4").tobytes() for document in documents]
        offsets = np.cumsum([8 + 4 * len(items), *map(len, items)]).astype("<u4")
        content = np.uint32(len(items)).tobytes() + offsets.tobytes() + b"".join(items)
        (folder / f"chunk-0-{number}.bin").write_bytes(pack(content) if pack else content)
    config = {"data_format": ["no_header_tensor:16"], "compression": "zstd" if pack else None, "encryption": None}
    names = [{"filename": f"chunk-0-{number}.bin", "chunk_size": len(c)} for number, c in enumerate(chunks)]
    (folder / "index.json").write_text(json.dumps({"config": config, "chunks": names}))
    return TokenFiles(path=str(folder))


MAKERS = {
    "numpy": numpy_flat,
    "nanogpt": nanogpt,
    "megatron": megatron,
    "megatron's bin": lambda folder: megatron(folder, path="data_text_document.bin"),
    "litdata": litdata,
    "litdata packed": lambda folder: litdata(folder, zstandard.compress),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_ids_of_every_format_become_the_store_of_their_text(tmp_path, kind):
    tokenizer = ByteTokenizer()
    source = MAKERS[kind](tmp_path)
    assert [ids.tolist() for ids in source.token_documents(EOS)] == DOCUMENTS
    store = tokenize(source, tokenizer, tmp_path.parent / f"{tmp_path.name}.store", show_progress=False)
    text = tokenize(TEXTS, tokenizer, tmp_path.parent / f"{tmp_path.name}.text", show_progress=False)
    assert store.fingerprint == text.fingerprint
    assert (store.num_bytes, store.meta["bos_id"]) == (text.num_bytes, text.meta["bos_id"])
    assert Part.from_dict(source.to_dict()) == source
    assert source.fingerprint == Part.from_dict(source.to_dict()).fingerprint


def test_rows_of_an_array_are_documents_that_end_at_the_end_of_text_too(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 2, EOS], [3, EOS, 4], [EOS, EOS, EOS]]))
    source = TokenFiles(path=str(tmp_path / "a.npy"))
    assert [ids.tolist() for ids in source.token_documents(EOS)] == [[1, 2], [3], [4]]
    assert [len(ids) for ids in source.token_documents(None)] == [3, 3, 3]


@pytest.mark.parametrize(
    ("array", "how", "message"),
    [
        (np.zeros((2, 2, 2), np.int64), {}, r"is int64 \[2, 2, 2\]; ids are integers"),
        (np.zeros(3), {}, "is float64"),
        (np.array([{}]), {}, "cannot be read as an array of ids"),
        (b"\1\0\2", {}, "pass dtype='uint16'"),
        (b"\1\0\2", {"dtype": "uint16"}, "has 3 bytes, no whole number of uint16"),
        (b"", {"dtype": "uint16"}, "has 0 bytes"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, array, how, message):
    path = tmp_path / "a.bin"
    with path.open("wb") as file:
        file.write(array) if isinstance(array, bytes) else np.save(file, array)
    with pytest.raises(DataError, match=message):
        list(TokenFiles(path=str(path), **how).token_documents(EOS))


def test_damage_is_named(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        list(TokenFiles(path="gone").token_documents(EOS))
    source = megatron(tmp_path)
    (tmp_path / "data_text_document.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"no index of version 1 of the 1 ids"):
        list(source.token_documents(EOS))
    (tmp_path / "data_text_document.idx").write_bytes(b"MMIDIDX\0\0")
    with pytest.raises(DataError, match="cannot be read as a Megatron data set"):
        list(source.token_documents(EOS))
    source = litdata(tmp_path)
    path = tmp_path / "chunk-0-1.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"chunk-0-1.bin was cut short"):
        list(source.token_documents(EOS))
    (tmp_path / "index.json").write_text('{"config": {"data_format": ["jpeg"]}, "chunks": []}')
    with pytest.raises(DataError, match="describes no chunks of token ids"):
        list(source.token_documents(EOS))


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 50256]))
    with pytest.raises(DataError, match=r"ids reach from 1 to 50256, but the vocabulary has 257"):
        tokenize(TokenFiles(path=str(tmp_path / "a.npy")), ByteTokenizer(), tmp_path / "s", show_progress=False)


def test_ids_are_split_and_read_by_a_data_module(tmp_path):
    folder = tmp_path / "ids"
    folder.mkdir()
    source = numpy_flat(folder)
    loading = Loading(cache_dir=str(tmp_path / "cache"), show_progress=False)
    data = TextDataModule(source, 0.3, tokenizer=ByteTokenizer(), context_length=8, batch_size=1, loading=loading)
    data.prepare_data()
    data.setup("fit")
    held_out = list(data.validation_texts())
    text_side = hold_out(tokenize_texts(), 0.3)[1]
    assert held_out
    assert set(held_out) < set(TEXTS)
    assert len(held_out) == len(list(text_side.documents()))
    with pytest.raises(DataError, match="LoadTokenizer"):
        TextDataModule(source, loading=loading).prepare_data()


def tokenize_texts():
    from lightning_lm.data import Texts

    return Texts(texts=TEXTS)


def test_one_document_of_ids_is_cut_for_validation(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100))
    sides = hold_out(TokenFiles(path=str(tmp_path / "a.npy")), 0.1)
    assert all(isinstance(side, Split) for side in sides)
    train, validation = ([ids.tolist() for ids in side.token_documents(EOS)] for side in sides)
    assert (train, validation) == ([list(range(90))], [list(range(90, 100))])


def test_ids_in_memory_become_a_store(tmp_path):
    store = write_store(np.array(FLAT), [4, 8, 6], tmp_path / "a", tokenizer=ByteTokenizer())
    text = tokenize(TEXTS, ByteTokenizer(), tmp_path / "b", show_progress=False)
    assert (store.fingerprint, store.num_bytes) == (text.fingerprint, text.num_bytes)
    assert write_store(FLAT, None, tmp_path / "c", vocab_size=257, eos_id=EOS).fingerprint == text.fingerprint
    store = write_store(np.arange(100), [100], tmp_path / "d")
    assert TokenStream(store, row_length=8, shuffle=False)[0]["input_ids"].tolist() == list(range(8))
    assert (store.vocab_size, store.eos_id, store.bos_id) == (100, None, None)


@pytest.mark.parametrize(
    ("ids", "documents", "how", "message"),
    [
        ([1.5], [1], {}, "token ids are integers"),
        ([], [], {}, "at least one"),
        ([1, 2], [1], {}, "add up to 1, and there are 2 ids"),
        ([1, 2], [2, 0], {}, "at least 1"),
        ([1, 2], [2], {"vocab_size": 2}, "vocabulary has 2"),
        ([-1, 2], [2], {}, "reach from -1"),
    ],
)
def test_ids_that_make_no_store_are_refused(tmp_path, ids, documents, how, message):
    with pytest.raises(DataError, match=message):
        write_store(ids, documents, tmp_path / "a", **how)
    assert not (tmp_path / "a").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="exists"):
        write_store([1], [1], tmp_path / "there")
