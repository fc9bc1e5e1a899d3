"""Chunks of a corpus, tokenized by several processes into one file each, which a later run finds again."""

import functools
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_lm.data.parallel import in_order
from lightning_lm.data.store import token_dtype
from lightning_lm.errors import DataError, TokenizerError
from lightning_lm.protocols import Tokenizer
from lightning_lm.storage import replacing

__all__ = ["Chunk", "chunks_of", "encode_chunks", "read_shard"]

_CHUNK_BYTES = 1 << 21
_HEADER = 24
"""Bytes before the lengths of the documents: numbers of documents and tokens, checksum of both and of the rest."""


class Chunk(NamedTuple):
    """Documents that are tokenized together."""

    texts: list[str]
    num_bytes: int
    digest: str


def chunks_of(documents: Iterable[str], salt: str) -> Iterator[Chunk]:
    """Group documents to about 2 MB, each group named by a digest of its text and of the salt."""
    texts: list[str] = []
    num_bytes, digest = 0, hashlib.sha256(salt.encode())
    for text in documents:
        data = text.encode("utf-8", "surrogatepass")
        if not data:
            continue
        texts.append(text)
        num_bytes += len(data)
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        if num_bytes >= _CHUNK_BYTES:
            yield Chunk(texts, num_bytes, digest.hexdigest())
            texts = []
            num_bytes, digest = 0, hashlib.sha256(salt.encode())
    if texts:
        yield Chunk(texts, num_bytes, digest.hexdigest())


def encode_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, folder: Path, num_workers: int
) -> Iterator[tuple[Path, int]]:
    """Write a shard for each chunk that has none yet; yield its path and the chunk's bytes, in order.

    Raises:
        DataError: If a process that tokenized was killed.
        TokenizerError: If a text cannot be encoded, or the tokenizer returns ids outside its vocabulary.
    """
    remedy = "Finished parts are kept: call again, with a smaller num_workers if it was memory."
    encode = functools.partial(_encode, tokenizer=tokenizer, folder=folder)
    yield from in_order(encode, chunks, num_workers=num_workers, remedy=remedy)


def read_shard(path: Path, dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the tokens of a shard and the length of each of its documents.

    Raises:
        DataError: If it has changed since it was written.
    """
    data = path.read_bytes()
    if int.from_bytes(data[16:_HEADER], "little") != zlib.crc32(memoryview(data)[_HEADER:], zlib.crc32(data[:16])):
        raise DataError(f"{path} has changed since it was written. Delete it and tokenize again.")
    num_documents = int.from_bytes(data[:8], "little")
    # A copy: a view would keep the bytes of the whole shard, and the store keeps the lengths of all of them.
    lengths = np.frombuffer(data, np.int64, num_documents, offset=_HEADER).copy()
    return np.frombuffer(data, dtype, offset=_HEADER + lengths.nbytes), lengths


def _encode(chunk: Chunk, *, tokenizer: Tokenizer, folder: Path) -> tuple[Path, int]:
    path = folder / chunk.digest
    if not _is_whole(path, tokenizer):
        _write_shard(chunk.texts, tokenizer, path)
    return path, chunk.num_bytes


def _write_shard(texts: list[str], tokenizer: Tokenizer, path: Path) -> None:
    dtype, eos_id = token_dtype(tokenizer.vocab_size), tokenizer.eos_id
    end = np.array([] if eos_id is None else [eos_id], dtype=dtype)
    documents = tokenizer.encode_batch(texts)
    largest = max((int(ids.max()) for ids in documents if len(ids)), default=0)
    if largest >= tokenizer.vocab_size:
        raise TokenizerError(f"The tokenizer returned the id {largest}, but its vocab_size is {tokenizer.vocab_size}.")
    lengths = np.array([len(ids) + len(end) for ids in documents], dtype=np.int64)
    tokens = [part for ids in documents for part in (ids.astype(dtype, copy=False), end)]
    kept = lengths[lengths > 0]
    counts = len(kept).to_bytes(8, "little") + int(lengths.sum()).to_bytes(8, "little")
    content = kept.tobytes() + np.concatenate(tokens).tobytes()
    with replacing(path) as file:
        file.write(counts + zlib.crc32(content, zlib.crc32(counts)).to_bytes(8, "little") + content)


def _is_whole(path: Path, tokenizer: Tokenizer) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        header = file.read(_HEADER)
    num_documents, num_tokens = int.from_bytes(header[:8], "little"), int.from_bytes(header[8:16], "little")
    size = _HEADER + 8 * num_documents + token_dtype(tokenizer.vocab_size).itemsize * num_tokens
    if path.stat().st_size != size:
        return False
    try:
        read_shard(path, token_dtype(tokenizer.vocab_size))
    except DataError:
        return False
    return True
