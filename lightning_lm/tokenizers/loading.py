"""Open a tokenizer whatever its kind: from a folder, a file, or the contents of files in a checkpoint."""

import base64
import pickle
from collections.abc import Mapping
from pathlib import Path

from lightning_lm.errors import LightningLMError, TokenizerError
from lightning_lm.storage import check_archive, check_digests, where_from
from lightning_lm.tokenizers import gpt2_files
from lightning_lm.tokenizers.base import CHAT_TEMPLATE, MARKER, BaseTokenizer, read_marker
from lightning_lm.tokenizers.bpe import BPETokenizer
from lightning_lm.tokenizers.pretrained import TOKEN_MAP, PretrainedTokenizer
from lightning_lm.tokenizers.sentencepiece import MODEL_BASE64, MODEL_FILE, SentencePieceTokenizer
from lightning_lm.tokenizers.simple import ByteTokenizer, CharacterTokenizer, WordTokenizer
from lightning_lm.tokenizers.tiktoken_ranks import definition_of_ranks, is_rank_file

__all__ = ["load_tokenizer", "tokenizer_from_files"]

_KINDS: dict[str, type[BaseTokenizer]] = {
    kind.__name__: kind
    for kind in (BPETokenizer, SentencePieceTokenizer, ByteTokenizer, CharacterTokenizer, WordTokenizer)
}
_TEXT_FILES = (
    MARKER,
    "tokenizer.json",
    "tokenizer_config.json",
    TOKEN_MAP,
    CHAT_TEMPLATE,
    "entries.json",
    "vocab.json",
    "merges.txt",
)

_DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that values of another type or size than expected lead to, wherever they are first used."""


def load_tokenizer(path: Path | str) -> BaseTokenizer:
    """Return the tokenizer in a folder or file.

    Args:
        path: A folder that `save` wrote; a folder with ``tokenizer.json``, ``tokenizer.model``, or ``vocab.json`` and
            ``merges.txt``; or one of these files; or a ``.ckpt`` of this package.

    Raises:
        TokenizerError: If there is no tokenizer, or it is damaged.
        CheckpointError: If the ``.ckpt``, or a file of the folder, has changed since it was written.
    """
    path = Path(path)
    if path.is_file():
        check_digests(path.parent, [path.name])
    if path.is_file() and path.suffix == ".model":
        content = path.read_bytes()
        if is_rank_file(content):
            return PretrainedTokenizer.from_files(definition_of_ranks(content))
        return SentencePieceTokenizer.from_model_file(path)
    if path.is_file() and path.suffix == ".ckpt":
        return tokenizer_from_files(_files_in_checkpoint(path))
    if path.is_file() and path.name not in _TEXT_FILES:
        return PretrainedTokenizer.load(path)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise TokenizerError(f"There is no tokenizer at {path} (looked from {Path.cwd()}). {where_from(path)}")
    try:
        return tokenizer_from_files(_read(folder))
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def tokenizer_from_files(files: Mapping[str, str]) -> BaseTokenizer:
    """Return the tokenizer that `to_files` of any kind described.

    Args:
        files: Contents of files by name, as a checkpoint carries them.

    Raises:
        TokenizerError: If the files are of no tokenizer, or damaged.
    """
    try:
        return _from_files(files)
    except _DAMAGE as error:
        if isinstance(error, LightningLMError):
            raise
        raise TokenizerError(
            f"The tokenizer's files are damaged ({type(error).__name__}: {error}). Copy them again, or make it anew."
        ) from error


def _from_files(files: Mapping[str, str]) -> BaseTokenizer:
    if MARKER in files:
        kind = read_marker(files).get("kind")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise TokenizerError(f"{MARKER} names the kind {kind!r}; known are {', '.join(_KINDS)}.")
        tokenizer = _KINDS[kind].from_files(files)
        tokenizer.chat_template = files.get(CHAT_TEMPLATE)
        return tokenizer
    if "tokenizer.json" in files:
        return PretrainedTokenizer.from_files(files)
    if MODEL_BASE64 in files:
        content = base64.b64decode(files[MODEL_BASE64])
        if is_rank_file(content):
            return PretrainedTokenizer.from_files(definition_of_ranks(content))
        return SentencePieceTokenizer.from_files(files)
    if "vocab.json" in files and "merges.txt" in files:
        parsed = gpt2_files.parse(files["vocab.json"], files["merges.txt"])
        return BPETokenizer(parsed.merges, ids=parsed.ids, special_tokens=parsed.special_tokens, pattern="gpt2")
    raise TokenizerError(
        f"No tokenizer here: needed is {MARKER}, tokenizer.json, {MODEL_FILE}, or vocab.json with merges.txt."
    )


def _files_in_checkpoint(path: Path) -> dict[str, str]:
    """Return the tokenizer files in a checkpoint; its weights are not read."""
    import torch

    check_archive(path)
    try:
        files = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["lightning_lm"]["tokenizer"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise TokenizerError(f"{path} is no checkpoint of this package, or is damaged.") from error
    if files is None:
        raise TokenizerError(f"{path} carries no tokenizer; name the folder of the one it was trained with.")
    return dict(files)


def _read(folder: Path) -> dict[str, str]:
    check_digests(folder, [*_TEXT_FILES, MODEL_FILE])
    files = {name: _text(folder / name) for name in _TEXT_FILES if (folder / name).is_file()}
    if (folder / MODEL_FILE).is_file():
        files[MODEL_BASE64] = base64.b64encode((folder / MODEL_FILE).read_bytes()).decode()
    return files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path.name} is damaged: it is no UTF-8 at byte {error.start:,}.") from error
