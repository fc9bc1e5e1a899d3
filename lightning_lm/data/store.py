"""The token store: a corpus as numbers on disk, mapped into memory so that opening it costs nothing.

A store is a folder of three files: ``tokens.bin`` (every token, 16 or 32 bits, documents one after the other),
``index.npy`` (where each document ends, int64) and ``meta.json``.
"""

import hashlib
import json
import mmap
import tokenize
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import DataError
from lightning_lm.storage import SWITCH, is_remembered, naming, remember, synced, verifies
from lightning_lm.storage.json_text import parse_json

__all__ = ["TokenStore", "token_dtype", "write_shards"]

_FORMAT = 2
"""Format 1 did not have the id that begins a row."""
_KEYS = {"format", "dtype", "vocab_size", "eos_id", "num_tokens", "num_documents", "num_bytes", "tokenizer", "source"}


class TokenStore:
    """A tokenized corpus on disk, checked when it is opened and never read as a whole.

    Args:
        path: The folder that `tokenize` wrote.

    Attributes:
        path: The folder.
        meta: The content of ``meta.json``.
        tokens: Every token, uint16 or uint32 [num_tokens], memory-mapped.
        ends: Where each document ends in ``tokens``, int64 [num_documents], memory-mapped.

    Raises:
        DataError: If the folder is no store, or a store that was cut short or changed.
    """

    learned: NDArray[np.bool_] | None = None
    """Mask of the target tokens, [num_tokens]; ``None`` if all are targets."""
    files: tuple[str, ...] = ("tokens.bin", "index.npy")
    """Files that are compared with their digests."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        self.tokens = self._map_tokens()
        self.ends = self._map_ends()
        self.learned = self._map_learned()
        if verifies() and not is_remembered(self.path, self.files):
            self.verify()
            remember(self.path, self.files)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the tokens of one document, end-of-text token included."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Document {index} of {len(self)}.")
        index %= len(self)
        return self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[str]]:
        return TokenStore, (str(self.path),)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, end-of-text tokens included."""
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text that was tokenized."""
        return int(self.meta["num_bytes"])

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer."""
        return int(self.meta["vocab_size"])

    @property
    def eos_id(self) -> int | None:
        """The id that ends each document, if the tokenizer has one."""
        eos_id = self.meta["eos_id"]
        return None if eos_id is None else int(eos_id)

    @property
    def bos_id(self) -> int | None:
        """The id before the first token of each document in a row: the tokenizer's begin, or else its end of text."""
        bos_id = self.meta.get("bos_id")
        return self.eos_id if bos_id is None else int(bos_id)

    @property
    def fingerprint(self) -> str:
        """Hex digest (SHA-256) of the tokens, of the documents' ends and of the ids that begin and end a document."""
        return str(self.meta["fingerprint"])

    def verify(self) -> None:
        """Read every token and compare with the fingerprint, as the first opening after a change of a file does.

        Raises:
            DataError: If a byte of the store has changed since it was written.
        """
        digest = _new_digest(self.meta)
        piece = memoryview(bytearray(1 << 20))
        with (self.path / "tokens.bin").open("rb", buffering=0) as file:  # a mapped file would count as memory
            while count := file.readinto(piece):
                digest.update(piece[:count])
        digest.update(self.ends.tobytes())
        if digest.hexdigest() != self.meta["fingerprint"]:
            raise _changed(self.path, "tokens.bin or index.npy")

    def _map_learned(self) -> NDArray[np.bool_] | None:
        """Return a mask of the target tokens, for stores that have one."""
        return None

    def _map_tokens(self) -> NDArray[Any]:
        path, dtype = self.path / "tokens.bin", np.dtype(self.meta["dtype"])
        needed = self.meta["num_tokens"] * dtype.itemsize
        found = path.stat().st_size if path.is_file() else 0
        if found != needed:
            raise _damaged(self.path, f"tokens.bin has {found} bytes, meta.json states {needed}")
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)

    def _map_ends(self) -> NDArray[np.int64]:
        try:
            ends = np.asarray(np.load(self.path / "index.npy", mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, tokenize.TokenError) as error:
            raise _damaged(self.path, f"index.npy cannot be read ({error})") from error
        if ends.dtype != np.int64 or ends.shape != (self.meta["num_documents"],):
            raise _damaged(self.path, "index.npy does not belong to meta.json")
        if ends[-1] != self.num_tokens or ends[0] < 1 or np.any(np.diff(ends) < 1):
            raise _damaged(self.path, "index.npy does not divide tokens.bin into documents")
        return ends


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest of uint16 and uint32 that represents every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write_shards(
    path: Path,
    shards: Iterable[tuple[NDArray[Any], NDArray[np.int64]]],
    meta: dict[str, Any],
    *,
    num_bytes: Callable[[], int] | None = None,
) -> None:
    """Write a store into a new folder, which no reader takes for a store before its last file is there.

    Args:
        path: The folder to make; the caller renames it into place.
        shards: Tokens and lengths of documents, in order.
        meta: Contents of ``meta.json`` besides counts and fingerprint: dtype, vocab_size, eos_id, ...
        num_bytes: Returns the UTF-8 bytes of the text once all shards are read, if ``meta`` does not have them.

    Raises:
        DataError: If there is no token to write.
        OSError: If it cannot be written; has the path as ``filename``.
    """
    with naming(path):
        _write_files(path, shards, meta, num_bytes)


def _write_files(
    path: Path,
    shards: Iterable[tuple[NDArray[Any], NDArray[np.int64]]],
    meta: dict[str, Any],
    num_bytes: Callable[[], int] | None,
) -> None:
    path.mkdir()
    digest = _new_digest(meta)
    lengths: list[NDArray[np.int64]] = []
    with synced(path / "tokens.bin") as file:
        for tokens, counts in shards:
            data = tokens.tobytes()
            file.write(data)
            digest.update(data)
            lengths.append(counts)
    ends = np.cumsum(np.concatenate(lengths), dtype=np.int64) if lengths else np.zeros(0, np.int64)
    if not len(ends):
        raise DataError("The corpus is empty: it has no document with any text. Check the path and the separator.")
    digest.update(ends.tobytes())
    with synced(path / "index.npy") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(ends))
        file.write(ends.tobytes())
    if num_bytes is not None:
        meta = {**meta, "num_bytes": num_bytes()}
    counts_of = {"num_tokens": int(ends[-1]), "num_documents": len(ends), "fingerprint": digest.hexdigest()}
    meta = {"format": _FORMAT, **meta, **counts_of}
    with synced(path / "meta.json") as file:
        file.write(json.dumps({**meta, "checksum": _checksum(meta)}, indent=2).encode())


def _new_digest(meta: Mapping[str, Any]) -> "hashlib._Hash":
    eos_id, bos_id = meta["eos_id"], meta.get("bos_id")
    ids = [eos_id] if bos_id in (None, eos_id) else [eos_id, bos_id]
    return hashlib.sha256(f"{meta['dtype']}:{':'.join(map(str, ids))}:".encode())


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = parse_json((path / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is no token store (it has no meta.json). Make one with lightning_lm.data.tokenize."
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, f"meta.json cannot be read ({error})") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path} is no token store: its meta.json is of type {type(meta).__name__}, not an object.")
    if lacking := sorted((_KEYS | {"fingerprint"}) - set(meta)):
        raise DataError(f"{path} is no token store: its meta.json lacks {lacking}.")
    if meta["format"] != _FORMAT:
        raise DataError(
            f"{path} has format {meta['format']}, this version reads {_FORMAT}. Delete it and tokenize again."
        )
    if verifies() and "checksum" in meta and _checksum(meta) != meta["checksum"]:
        raise _changed(path, "meta.json")
    _check_values(path, meta)
    return meta


def _check_values(path: Path, meta: Mapping[str, Any]) -> None:
    if meta["dtype"] not in ("uint16", "uint32"):
        raise _damaged(path, f"meta.json has dtype {meta['dtype']!r}, and tokens are uint16 or uint32")
    for name in ("vocab_size", "num_tokens", "num_documents", "num_bytes", "eos_id", "bos_id"):
        value, least = meta.get(name), int(name in ("vocab_size", "num_tokens", "num_documents"))
        if value is None and name in ("eos_id", "bos_id"):
            continue
        if type(value) is not int or value < least:
            raise _damaged(path, f"meta.json has {name} {value!r}, an integer of at least {least} is needed")


def _checksum(meta: Mapping[str, Any]) -> str:
    content = {name: value for name, value in meta.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _changed(path: Path, names: str) -> DataError:
    return DataError(
        f"The token store {path} is damaged: {names} has changed since it was written. Delete the folder and tokenize "
        f"again, or copy it from a place where it is intact. {SWITCH}=0 in the environment reads it as it is."
    )


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"The token store {path} is damaged: {what}. Delete the folder and tokenize again.")
