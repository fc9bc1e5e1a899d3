"""SentencePiece models, byte-pair encoding or unigram, trained here or by others."""

import base64
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from lightning_lm.errors import LightningLMError, MissingDependencyError, TokenizerError
from lightning_lm.tokenizers.base import (
    END_OF_TEXT,
    MARKER,
    ByteTableTokenizer,
    number_special,
    read_marker,
    refuse_surrogates,
    write_files,
)
from lightning_lm.tokenizers.patterns import last_match
from lightning_lm.tokenizers.streams import avoiding_special, rejoin, special_expression

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

__all__ = ["MODEL_BASE64", "MODEL_FILE", "SentencePieceTokenizer"]

MODEL_FILE = "tokenizer.model"
MODEL_BASE64 = "tokenizer.model.base64"

_SPACE_MARK = "\u2581"
_REPLACEMENT = "\ufffd".encode()
# Pieces begin with their spaces, so none reaches from another character to a space after it.
_BEFORE_SPACE = r"(?<=[^ \u2581])(?= )"
_SENTENCE_CHARACTERS = 4096


class SentencePieceTokenizer(ByteTableTokenizer):
    """A SentencePiece model.

    Models trained here leave the text as it is (no normalisation, no added space) and fall back to bytes, so every text
    comes back exactly. Models of others do what they were trained to do.

    Args:
        model: The content of a ``.model`` file.
        eos_token: The control symbol that ends a document; by default the model's own or ``<|endoftext|>``.

    Source:
        Kudo and Richardson 2018, arXiv:1808.06226; unigram: Kudo 2018, arXiv:1804.10959.
    """

    def __init__(self, model: bytes, *, eos_token: str | None = None) -> None:
        self._model = model
        self._processor = _processor(model)
        size = self._processor.vocab_size()
        self._byte_ids = {self._processor.id_to_piece(i): i for i in range(size) if self._processor.is_byte(i)}
        special = {self._processor.id_to_piece(i): i for i in range(size) if self._processor.is_control(i)}
        if eos_token is None and self._processor.eos_id() >= 0:
            eos_token = self._processor.id_to_piece(self._processor.eos_id())
        super().__init__([self._bytes_of(i) for i in range(size)], special, eos_token)
        self.unk_id = self._processor.unk_id()
        self._adds_space = self._processor.encode("a", out_type=str)[0].startswith(_SPACE_MARK)
        self._cuts_before_space = not self._adds_space and not any(
            re.search(f"[^{_SPACE_MARK}]{_SPACE_MARK}", self._processor.id_to_piece(i)) for i in range(size)
        )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        model_type: Literal["bpe", "unigram"] = "unigram",
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        num_workers: int | None = None,
    ) -> Self:
        """Train a model with byte fallback. SentencePiece holds all texts in memory.

        Args:
            texts: Documents; long ones are cut before spaces.
            vocab_size: Number of ids: the unknown piece, special tokens, 256 bytes, pieces; fewer if the texts do not
                hold enough.
            model_type: Algorithm that chooses the pieces.
            special_tokens: Control symbols. They split the text and belong to no piece.
            num_workers: Threads; by default one a CPU core.

        Raises:
            TokenizerError: If there is no text, or the vocabulary has no room for its characters.
        """
        trainer = _module().SentencePieceTrainer
        number_special(special_tokens, 1)
        model = io.BytesIO()
        refused: list[LightningLMError] = []
        try:
            trainer.Train(
                sentence_iterator=_remembering(_sentences(texts, special_tokens), refused),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                num_threads=num_workers or os.cpu_count() or 1,
                **_settings(special_tokens),
            )
        except RuntimeError as error:
            raise (refused[0] if refused else _explained(error, vocab_size)) from error
        return cls(model.getvalue())

    @classmethod
    def from_model_file(cls, path: Path | str, *, eos_token: str | None = None) -> Self:
        """Read a ``.model`` file."""
        return cls(Path(path).read_bytes(), eos_token=eos_token)

    @property
    def prefix_ids(self) -> list[int]:
        """Ids before every text: the model's begin, such as Llama's ``<s>``; or else its end of text, if it has one."""
        bos_id = self._processor.bos_id()
        marks = [bos_id if bos_id >= 0 else self.eos_id]
        return [mark for mark in marks if mark is not None]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without the space that some models put before every text."""
        text = super().decode(ids)
        return text[1:] if self._adds_space and text.startswith(" ") else text

    def to_files(self) -> dict[str, str]:
        """Return the content of the files; the model, which is binary, as base64."""
        return {MODEL_BASE64: base64.b64encode(self._model).decode(), **self._marker()}

    def save(self, path: Path | str) -> None:
        """Write the model as ``tokenizer.model``, which SentencePiece reads, and the other files."""
        others = {name: content for name, content in self.to_files().items() if name != MODEL_BASE64}
        write_files(Path(path), {MODEL_FILE: self._model, **others})

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> Self:
        """Return the tokenizer that `to_files` described."""
        eos_token = read_marker(files)["eos_token"] if MARKER in files else None
        if MODEL_BASE64 not in files:
            raise TokenizerError(f"{MODEL_FILE} is missing: these files are no complete tokenizer.")
        return cls(base64.b64decode(files[MODEL_BASE64]), eos_token=eos_token)

    def _encode_ordinary(self, text: str) -> list[int]:
        if _SPACE_MARK not in text or not self._byte_ids:
            return list(self._processor.encode(text))
        # SentencePiece writes spaces as this mark, and cannot tell it from a real one: that is spelled in bytes.
        mark = [self._byte_ids[f"<0x{byte:02X}>"] for byte in _SPACE_MARK.encode()]
        first, *others = text.split(_SPACE_MARK)
        ids = list(self._processor.encode(first)) if first else []
        for part in others:
            ids += mark + (self._processor.encode(part) if part else [])
        return ids

    def _last_cut(self, text: str) -> int:
        return last_match(_BEFORE_SPACE, text) if self._cuts_before_space else 0

    def _bytes_of(self, number: int) -> bytes:
        piece: str = self._processor.id_to_piece(number)
        if self._processor.is_byte(number):
            return bytes([int(piece[3:-1], 16)])
        if self._processor.is_unknown(number):
            return _REPLACEMENT
        return piece.encode() if self._processor.is_control(number) else piece.replace(_SPACE_MARK, " ").encode()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._model, self.eos_token)


def _rebuild(cls: type[SentencePieceTokenizer], model: bytes, eos_token: str | None) -> SentencePieceTokenizer:
    return cls(model, eos_token=eos_token)


def _module() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise MissingDependencyError("sentencepiece", "use SentencePiece models", "sentencepiece") from error
    return sentencepiece


def _processor(model: bytes) -> "SentencePieceProcessor":
    try:
        processor: SentencePieceProcessor = _module().SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise TokenizerError(f"This is no SentencePiece model, or it is damaged ({error}).") from error
    return processor


def _settings(special_tokens: Sequence[str]) -> dict[str, Any]:
    return {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "control_symbols": list(special_tokens),
        "unk_id": 0,
        "bos_id": -1,
        "eos_id": -1,
        "pad_id": -1,
        "hard_vocab_limit": False,
        "max_sentence_length": 1 << 24,
        "minloglevel": 2,
    }


def _sentences(texts: Iterable[str], special_tokens: Sequence[str]) -> Iterator[str]:
    def before_space(text: str) -> int:
        return last_match(_BEFORE_SPACE, text)

    expression = special_expression(special_tokens)
    last_cut = avoiding_special(before_space, special_tokens)
    for text in texts:
        refuse_surrogates(text)
        blocks = (text[i : i + _SENTENCE_CHARACTERS] for i in range(0, len(text), _SENTENCE_CHARACTERS))
        for chunk in rejoin(blocks, last_cut, size=_SENTENCE_CHARACTERS):
            yield from filter(None, expression.split(chunk) if expression else (chunk,))


def _remembering(sentences: Iterator[str], refused: list[LightningLMError]) -> Iterator[str]:
    """Keep our own errors: SentencePiece turns what its iterator raises into a text."""
    try:
        yield from sentences
    except LightningLMError as error:
        refused.append(error)
        raise


def _explained(error: RuntimeError, vocab_size: int) -> TokenizerError:
    message = str(error)
    if "sentences_.empty()" in message:
        return TokenizerError("SentencePiece cannot be trained: the texts are empty.")
    if "required_chars" in message:
        return TokenizerError(
            f"vocab_size={vocab_size} is too small for 256 bytes, special tokens and the texts' characters; choose a "
            f"larger one. SentencePiece reports: {message}"
        )
    return TokenizerError(f"SentencePiece cannot be trained with vocab_size={vocab_size}: {message}")
