"""Text that was tokenized elsewhere: id arrays of NumPy, nanoGPT, Megatron and litdata, and ids in memory."""

import dataclasses
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.paths import find_files
from lightning_lm.data.sources import Source, digest_of_files
from lightning_lm.data.store import TokenStore, token_dtype, write_shards
from lightning_lm.data.unpacking import read_blocks
from lightning_lm.errors import DataError
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import locked, rename
from lightning_lm.storage.json_text import parse_json

__all__ = ["TokenFiles", "begin_id", "token_shards", "write_store"]

Ids = NDArray[Any]
_BLOCK = 1 << 22
_MEGATRON = b"MMIDIDX\0\0"
_MEGATRON_DTYPES = (None, "u1", "i1", "i2", "i4", "i8", "f4", "f8", "u2")
_LITDATA_DTYPES = {
    "no_header_tensor": {11: "u1", 12: "i1", 13: "i2", 14: "i2", 15: "i4", 16: "i4", 17: "i8", 18: "i8", 20: "u2"},
    "no_header_numpy": {0: "i1", 1: "i2", 2: "i4", 3: "i8", 4: "u1", 5: "u2", 6: "u4", 7: "u8"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFiles(Source):
    """Token ids that exist already; the run's tokenizer must be the one that made them.

    ``.npy`` arrays, flat or with a document in each row, Megatron's ``.bin`` with its ``.idx``, litdata's folders of
    token chunks, and, with a dtype, files without a header such as nanoGPT's ``train.bin``. A document ends after each
    end-of-text id too.

    Args:
        path: A file, or litdata's folder.
        dtype: Type of the ids of a file without a header; ``None`` for the other formats, which name theirs.
    """

    path: str = dataclasses.field(kw_only=False)
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None

    def documents(self) -> Iterator[str]:
        """Refuse: there is no text.

        Raises:
            DataError: Always; the message says how to name the tokenizer.
        """
        raise DataError(
            f"{self.path} has token ids and no text, so a tokenizer cannot be trained on it. Name the one that made "
            "the ids: --data.tokenizer LoadTokenizer --data.tokenizer.path FOLDER"
        )

    def token_documents(self, eos_id: int | None) -> Iterator[Ids]:
        """Yield the ids of each document, without the end-of-text id at its end.

        Args:
            eos_id: The id that ends a document; ``None`` leaves flat arrays whole.

        Raises:
            DataError: If the file is in none of the formats, or damaged.
        """
        for ids, ends in self._arrays():
            for piece in [ids] if ends is None else _slices(ids, ends):
                for document in _cut(piece, eos_id):
                    ended = eos_id is not None and document[-1] == eos_id
                    if len(document) > ended:
                        yield document[: len(document) - ended]

    @property
    def fingerprint(self) -> str | None:
        """Digest of names, sizes and times of change of the files."""
        path = Path(self.path)
        parts = [path.with_suffix(suffix) for suffix in (".bin", ".idx")]
        files = parts if all(part.is_file() for part in parts) else find_files(self._existing())
        return digest_of_files(files, path if path.is_dir() else path.parent, self.dtype)

    def _arrays(self) -> Iterator[tuple[Ids, NDArray[np.int64] | None]]:
        if Path(self.path).with_suffix(".idx").is_file():
            yield _megatron(Path(self.path))
            return
        path = self._existing()
        if (path / "index.json").is_file():
            yield from _litdata(path)
        elif path.is_file() and _start(path).startswith(b"\x93NUMPY"):
            yield _numpy(path)
        elif path.is_file() and self.dtype is not None:
            yield _flat(path, self.dtype)
        else:
            raise DataError(
                f"{path} is no .npy array, Megatron .bin with its .idx, or litdata folder. A file of bare ids, such as "
                "nanoGPT's train.bin, does not tell their type; pass dtype='uint16' (--data.train TokenFiles "
                f"--data.train.path {path} --data.train.dtype uint16)."
            )

    def _existing(self) -> Path:
        if not Path(self.path).exists():
            raise DataError(f"There is no file or folder {self.path!r} (looked from {Path.cwd()}).")
        return Path(self.path)


def write_store(
    ids: Any,
    documents: Any,
    folder: Path | str,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    eos_id: int | None = None,
    bos_id: int | None = None,
) -> TokenStore:
    """Write token ids that are in memory as a token store, for `TokenStream`.

    Args:
        ids: All ids, one document after the other, an integer array [num_tokens].
        documents: Length of each document in tokens, end-of-text id included, [num_documents]; ``None`` cuts the ids
            after each end-of-text id.
        folder: Folder of the store, which must not exist.
        tokenizer: The tokenizer that made the ids; its values are the defaults of the following.
        vocab_size: Number of ids of the vocabulary; by default one more than the largest.
        eos_id: The id that ends each document.
        bos_id: The id before the first token of each document in a row; ``None`` takes ``eos_id``.

    Raises:
        DataError: If the ids are no integers of the vocabulary, the lengths do not sum to them, or the folder exists.
    """
    tokens = np.asarray(ids).reshape(-1)
    if tokens.dtype.kind not in "iu" or not len(tokens):
        raise DataError(
            f"ids has dtype {tokens.dtype} and {len(tokens)} elements; token ids are integers, at least one."
        )
    if tokenizer is not None:
        vocab_size, eos_id = vocab_size or tokenizer.vocab_size, tokenizer.eos_id if eos_id is None else eos_id
        bos_id = begin_id(tokenizer) if bos_id is None else bos_id
    vocab_size = vocab_size or int(tokens.max()) + 1
    _check_range(tokens, vocab_size)
    pieces = _cut(tokens, eos_id) if documents is None else None
    lengths = np.array([len(piece) for piece in pieces] if pieces is not None else documents, dtype=np.int64)
    if lengths.sum() != len(tokens) or lengths.min(initial=1) < 1:
        raise DataError(
            f"The lengths of the {len(lengths)} documents add up to {lengths.sum()}, and there are {len(tokens)} ids. "
            "Pass the length of each document, at least 1; or None to cut after each eos_id."
        )
    return _written(
        Path(folder), tokens.astype(token_dtype(vocab_size)), lengths, tokenizer, (vocab_size, eos_id, bos_id)
    )


def _written(
    folder: Path, tokens: Ids, lengths: NDArray[np.int64], tokenizer: Tokenizer | None, ids: tuple[int, Any, Any]
) -> TokenStore:
    if folder.exists():
        raise DataError(f"{folder} exists; choose another folder, or delete it.")
    vocab_size, eos_id, bos_id = ids
    meta = {
        "dtype": tokens.dtype.name,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "bos_id": eos_id if bos_id is None else bos_id,
        "num_bytes": 0 if tokenizer is None else int(tokenizer.token_byte_lengths()[tokens].sum()),
        "tokenizer": "unknown" if tokenizer is None else tokenizer.fingerprint,
        "source": None,
    }
    unfinished = folder.with_name(f"{folder.name}.partial")
    with locked(unfinished):
        write_shards(unfinished / "store", [(tokens, lengths)], meta)
        rename(unfinished / "store", folder)
        shutil.rmtree(unfinished, ignore_errors=True)
    return TokenStore(folder)


def begin_id(tokenizer: Tokenizer) -> int | None:
    """Return the id before the first token of a document, which fine-tuning and generation put before a text.

    Args:
        tokenizer: Without a BOS id, its end-of-text id is returned, which precedes a document in a row of several.
    """
    published = getattr(tokenizer, "prefix_ids", None) or ()
    bos_id: int | None = getattr(tokenizer, "bos_id", None)
    return published[-1] if published else tokenizer.eos_id if bos_id is None else bos_id


def token_shards(documents: Iterator[Ids], tokenizer: Tokenizer) -> Iterator[tuple[Ids, NDArray[np.int64], int]]:
    """Yield documents of ids as the shards of a store, with the bytes of their text.

    Args:
        documents: Ids of each document, without the end-of-text id.
        tokenizer: The tokenizer that made the ids.

    Raises:
        DataError: If an id is not in its vocabulary.
    """
    dtype, eos_id = token_dtype(tokenizer.vocab_size), tokenizer.eos_id
    end = np.array([] if eos_id is None else [eos_id], dtype=dtype)
    sizes = tokenizer.token_byte_lengths()
    group: list[Ids] = []
    held = 0
    for document in documents:
        _check_range(document, tokenizer.vocab_size)
        group.append(np.concatenate([document.astype(dtype), end]))
        held += len(group[-1])
        if held >= _BLOCK:
            yield _shard(group, sizes)
            group, held = [], 0
    if group:
        yield _shard(group, sizes)


def _shard(group: list[Ids], sizes: NDArray[np.int64]) -> tuple[Ids, NDArray[np.int64], int]:
    tokens = np.concatenate(group)
    return tokens, np.array([len(document) for document in group], dtype=np.int64), int(sizes[tokens].sum())


def _check_range(ids: Ids, vocab_size: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DataError(
            f"The ids reach from {ids.min()} to {ids.max()}, but the vocabulary has {vocab_size}: they were made by "
            "another tokenizer, or have another dtype."
        )


def _cut(ids: Ids, eos_id: int | None) -> Iterator[Ids]:
    """Yield the ids between end-of-text ids."""
    begin = 0
    for block in range(0, len(ids) if eos_id is not None else 0, _BLOCK):
        for end in (np.flatnonzero(np.asarray(ids[block : block + _BLOCK]) == eos_id) + block + 1).tolist():
            yield ids[begin:end]
            begin = end
    if begin < len(ids):
        yield ids[begin:]


def _slices(ids: Ids, ends: NDArray[np.int64]) -> Iterator[Ids]:
    begin = 0
    for end in ends.tolist():
        yield ids[begin:end]
        begin = end


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _flat(path: Path, dtype: str) -> tuple[Ids, None]:
    size = np.dtype(dtype).itemsize
    if path.stat().st_size % size or not path.stat().st_size:
        raise DataError(f"{path} has {path.stat().st_size} bytes, no whole number of {dtype} ids; pass another dtype.")
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r"), None


def _numpy(path: Path) -> tuple[Ids, NDArray[np.int64] | None]:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as an array of ids: {error}") from error
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise DataError(f"{path} is {ids.dtype} {list(ids.shape)}; ids are integers, [tokens] or [documents, tokens].")
    if ids.ndim == 1:
        return ids, None
    return ids.reshape(-1), np.arange(1, len(ids) + 1, dtype=np.int64) * ids.shape[1]


def _megatron(path: Path) -> tuple[Ids, NDArray[np.int64]]:
    """Read Megatron's indexed data set: sequence lengths, their offsets, and which sequences begin a document."""
    index, data = path.with_suffix(".idx"), path.with_suffix(".bin")
    content = index.read_bytes()
    try:
        version, code, sequences, entries = struct.unpack_from("<QBQQ", content, 9)
        dtype = np.dtype(_MEGATRON_DTYPES[code])
        lengths = np.frombuffer(content, "<i4", sequences, 34)
        borders = np.frombuffer(content, "<i8", entries, 34 + 12 * sequences)
        ids = np.memmap(data, dtype.newbyteorder("<"), mode="r")
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[borders[1:]]
    except (struct.error, ValueError, IndexError, TypeError, OSError) as error:
        raise DataError(f"{index} and {data} cannot be read as a Megatron data set: {error}") from error
    if content[:9] != _MEGATRON or version != 1 or dtype.kind not in "iu" or int(lengths.sum()) != len(ids):
        raise DataError(f"{index} is no index of version 1 of the {len(ids)} ids in {data}; write both again.")
    return ids, ends


def _litdata(folder: Path) -> Iterator[tuple[Ids, NDArray[np.int64]]]:
    """Read litdata's chunks of tokens: the number of items, their offsets, then ids without headers."""
    try:
        index = parse_json((folder / "index.json").read_text(encoding="utf-8"))
        config, names = index["config"], [chunk["filename"] for chunk in index["chunks"]]
        (data_format,) = config["data_format"]
        name, _, code = data_format.partition(":")
        dtype = np.dtype(_LITDATA_DTYPES[name][int(code)])
        packed = config.get("compression")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / 'index.json'} describes no chunks of token ids (TokensLoader): {error!r}."
        ) from error
    if config.get("encryption") or packed not in (None, "zstd"):
        raise DataError(
            f"The chunks of {folder} are encrypted or packed by {packed!r}; write them without, or as zstd."
        )
    for path in (folder / name for name in names):
        content = b"".join(read_blocks(path))
        count = int.from_bytes(content[:4], "little")
        offsets = np.frombuffer(content[4 : 8 + 4 * count], "<u4").astype(np.int64)
        if len(offsets) != count + 1 or offsets[0] != 8 + 4 * count or offsets[-1] != len(content):
            raise DataError(f"{path} was cut short, or is no chunk of litdata; fetch it again.")
        yield np.frombuffer(content, dtype, offset=offsets[0]), (offsets[1:] - offsets[0]) // dtype.itemsize
