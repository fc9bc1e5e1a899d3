"""Base of all tokenizers of this package: batches, streams, special tokens in text, fingerprints, files."""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import ConfigurationError, LightningLMError, TokenizerError
from lightning_lm.storage import TOKENIZER_FILES, filling
from lightning_lm.storage.json_text import parse_json
from lightning_lm.tokenizers.chat_template import Message, render_chat_template
from lightning_lm.tokenizers.streams import avoiding_special, rejoin, special_expression

__all__ = ["CHAT_TEMPLATE", "CHAT_TOKENS", "END_OF_TEXT", "MARKER", "BaseTokenizer", "ByteTableTokenizer"]

END_OF_TEXT = "<|endoftext|>"
"""The special token that ends a document, unless another is chosen."""

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
"""The special tokens of ChatML; tokenizers that a run trains reserve them, so that its model can learn to chat."""

CHAT_TEMPLATE = "chat_template.jinja"
"""The file of the chat template, in a folder and in a checkpoint."""

MARKER = "lightning_lm_tokenizer.json"
"""The file with the kind of the tokenizer in a folder. It is written last."""

_FORMAT = 1


class BaseTokenizer(ABC):
    """Base of the tokenizers here; meets `lightning_lm.protocols.Tokenizer`.

    Args:
        special_tokens: Special tokens and their ids.
        eos_token: The special token that ends a document. Left out: ``<|endoftext|>`` if it is one of them, or the only
            one there is.
    """

    def __init__(self, special_tokens: Mapping[str, int], eos_token: str | None = None) -> None:
        if "" in special_tokens:
            raise TokenizerError("A special token is an empty string; leave it out.")
        if eos_token is None:
            eos_token = END_OF_TEXT if END_OF_TEXT in special_tokens else None
            if len(special_tokens) == 1:
                (eos_token,) = special_tokens
        elif eos_token not in special_tokens:
            raise TokenizerError(f"eos_token={eos_token!r} is none of the special tokens {list(special_tokens)}.")
        self._special = dict(special_tokens)
        self._special_expression = special_expression(self._special)
        self.eos_token = eos_token

    unk_id: int | None = None
    """Id of text that the vocabulary does not hold; ``None`` where every text can be written."""

    chat_template: str | None = None
    """Jinja program that writes conversations as text, as the model was trained on them; saved with the tokenizer."""

    tool_use_template: str | None = None
    """The template for conversations with tools, where several have been published under names."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens and their ids."""
        return MappingProxyType(self._special)

    @property
    def eos_id(self) -> int | None:
        """Id that separates documents and ends a completion, if there is one."""
        return None if self.eos_token is None else self._special[self.eos_token]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides which ids a text gets; a chat template decides none."""
        files = {name: content for name, content in self.to_files().items() if name != CHAT_TEMPLATE}
        return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of a text. Special tokens written in it are ordinary text unless allowed.

        Raises:
            TokenizerError: If the text contains a lone surrogate, which has no UTF-8 form.
        """
        refuse_surrogates(text)
        if not allow_special or self._special_expression is None:
            return self._encode_ordinary(text)
        ids: list[int] = []
        end = 0
        for match in self._special_expression.finditer(text):
            ids += self._encode_ordinary(text[end : match.start()])
            ids.append(self._special[match.group()])
            end = match.end()
        return ids + self._encode_ordinary(text[end:])

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Return the ids of each text, as uint16 where the vocabulary allows it and uint32 otherwise."""
        return [np.asarray(self.encode(text), dtype=self._dtype) for text in texts]

    def encode_iterable(self, texts: Iterable[str], *, allow_special: bool = False) -> Iterator[int]:
        """Yield the ids of texts that follow each other, in bounded memory.

        The ids are those of the joined text, wherever it was cut: text is held back up to the last place where it may
        be cut for certain, such as before a space. A text without such a place is encoded as a whole.
        """
        last_cut = avoiding_special(self._last_cut, self._special) if allow_special else self._last_cut
        for chunk in rejoin(texts, last_cut):
            yield from self.encode(chunk, allow_special=allow_special)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """Return a conversation as text, ready for ``encode(..., allow_special=True)``.

        Args:
            messages: Turns, each with ``role`` and ``content``.
            add_generation_prompt: Let the text end where the completion of the assistant begins.
            variables: Further variables of the template, such as ``tools``.

        Raises:
            ConfigurationError: If there is no template.
            TokenizerError: If a published tokenizer comes without one, or the template refuses the conversation.
        """
        if self.chat_template is None:
            raise self._no_template()
        template = self.tool_use_template if variables.get("tools") and self.tool_use_template else self.chat_template
        given = {**self.named_tokens, "add_generation_prompt": add_generation_prompt, **variables}
        return render_chat_template(template, messages, given)

    def with_chat_template(self, template: str) -> Self:
        """Return this tokenizer with another chat template.

        Args:
            template: A Jinja program.
        """
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.chat_template, copy.tool_use_template = template, None
        return copy

    def with_special_tokens(self, tokens: Sequence[str]) -> Self:
        """Return this tokenizer with further special tokens after its last id; the ids of every text stay the same.

        The model needs a row for each of them; many published models have spare ones.

        Args:
            tokens: Those that it has already are passed over.

        Raises:
            TokenizerError: If a token is empty, or tokens cannot be added to this kind.
        """
        new = [token for token in dict.fromkeys(tokens) if token not in self._special]
        if "" in new:
            raise TokenizerError("A special token is an empty string; leave it out.")
        if not new:
            return self
        longer = self._extended(new)
        longer.chat_template = self.chat_template
        return longer

    def _extended(self, tokens: Sequence[str]) -> Self:  # noqa: ARG002
        """Return a copy with special tokens that it does not have yet."""
        raise TokenizerError(
            f"Special tokens cannot be added to a {type(self).__name__}. Save the model's tokenizer as tokenizer.json "
            "(transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) does), and load that."
        )

    def _no_template(self) -> LightningLMError:
        return ConfigurationError(
            f"{type(self).__name__} carries no chat template; use ChatML (--data.template ChatML), or the tokenizer of "
            "a Hugging Face folder that has one."
        )

    @property
    def named_tokens(self) -> dict[str, str]:
        """Special tokens by the names under which chat templates read them, such as ``eos_token``."""
        return {} if self.eos_token is None else {"eos_token": self.eos_token}

    @abstractmethod
    def token_byte_lengths(self) -> NDArray[np.int64]:
        """Return int64 [vocab_size]: UTF-8 bytes of text that each id stands for, 0 for special tokens."""

    def word_starts(self) -> NDArray[np.bool_]:
        """Return bool [vocab_size]: True for ids that begin a word; here all."""
        return np.ones(self.vocab_size, dtype=np.bool_)

    def bytes_per_token(self, text: str) -> float:
        """Return how many UTF-8 bytes of a text one token stands for on average; 0 for an empty text."""
        return len(text.encode()) / max(1, len(self.encode(text)))

    @abstractmethod
    def to_files(self) -> dict[str, str]:
        """Return the content of every file that `save` writes, by name; checkpoints carry it."""

    @classmethod
    @abstractmethod
    def from_files(cls, files: Mapping[str, str]) -> Self:
        """Return the tokenizer that `to_files` described."""

    def save(self, path: Path | str) -> None:
        """Write everything needed to load it again into a folder.

        A new folder appears complete or not at all. In an existing one other files stay, and those without which the
        folder does not load are removed first and put last.
        """
        write_files(Path(path), self.to_files())

    @abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text without lone surrogates and special tokens."""

    def _last_cut(self, text: str) -> int:  # noqa: ARG002  (kinds that can cut a text look at it)
        """Return the last place where a text can be cut without changing its ids, 0 if there is none."""
        return 0

    @property
    def _dtype(self) -> type[np.unsignedinteger[Any]]:
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def _marker(self, **settings: Any) -> dict[str, str]:
        content = {"format": _FORMAT, "kind": type(self).__name__, **settings, "eos_token": self.eos_token}
        template = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template}
        return {**template, MARKER: json.dumps(content, ensure_ascii=False, indent=1)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, special_tokens={list(self._special)})"


class ByteTableTokenizer(BaseTokenizer):
    """A tokenizer in which every id stands for fixed bytes.

    Args:
        table: The bytes of each id, special tokens included; ``b""`` where an id is not used.
        special_tokens: Special tokens and their ids.
        eos_token: As in `BaseTokenizer`.
    """

    def __init__(self, table: Sequence[bytes], special_tokens: Mapping[str, int], eos_token: str | None = None) -> None:
        super().__init__(special_tokens, eos_token)
        self._table = list(table)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._table)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TokenizerError: If an id is not in the vocabulary.
        """
        numbers = as_list(ids, self.vocab_size)
        return b"".join(map(self._table.__getitem__, numbers)).decode("utf-8", errors="replace")

    def token_byte_lengths(self) -> NDArray[np.int64]:
        """Return int64 [vocab_size]: UTF-8 bytes of text that each id stands for, 0 for special tokens."""
        lengths = np.fromiter(map(len, self._table), dtype=np.int64, count=self.vocab_size)
        lengths[list(self._special.values())] = 0
        return lengths

    def word_starts(self) -> NDArray[np.bool_]:
        """Return bool [vocab_size]: True for tokens that begin with white space, and for special tokens."""
        starts = np.array([entry[:1].isspace() for entry in self._table], dtype=np.bool_)
        starts[list(self._special.values())] = True
        return starts


def refuse_surrogates(text: str) -> None:
    """Raise if a text cannot be written as UTF-8.

    Raises:
        TokenizerError: If the text contains a lone surrogate; the message has its position and a remedy.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text contains a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start:,}; it is "
            "no character and has no UTF-8 form. Repair the text first: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error


def as_list(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Return ids from a list, an array or a tensor, checked.

    Raises:
        TokenizerError: If an id is not in the vocabulary.
    """
    numbers: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if numbers and not (min(numbers) >= 0 and max(numbers) < vocab_size):
        wrong = next(number for number in numbers if not 0 <= number < vocab_size)
        raise TokenizerError(f"Token id {wrong} is not in the vocabulary, whose ids are 0 to {vocab_size - 1}.")
    return numbers


def number_special(special_tokens: Sequence[str], first_id: int) -> dict[str, int]:
    """Give special tokens the ids from ``first_id`` on.

    Raises:
        TokenizerError: If a special token is given twice, or one string stands where a list is needed.
    """
    if isinstance(special_tokens, str):
        raise TokenizerError(f"special_tokens={special_tokens!r} is one string; put it into a list.")
    ids = {token: first_id + index for index, token in enumerate(special_tokens)}
    if len(ids) < len(special_tokens):
        raise TokenizerError(f"A special token is given twice in {list(special_tokens)}.")
    return ids


def read_marker(files: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings in the `MARKER` file.

    Raises:
        TokenizerError: If the file is missing, damaged, or of a newer format.
    """
    try:
        settings = parse_json(files[MARKER])
        newer = settings["format"] > _FORMAT
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{MARKER} is missing or damaged: these files are no complete tokenizer.") from error
    if newer:
        raise TokenizerError(f"{MARKER} has format {settings['format']}; this version reads {_FORMAT}. Upgrade it.")
    return dict(settings)


def write_files(folder: Path, files: Mapping[str, str | bytes], *, known_by: Sequence[str] = TOKENIZER_FILES) -> None:
    """Write files into a folder, with their digests, so that no reader finds old and new ones together."""
    with filling(folder, known_by=known_by) as fresh:
        for name, content in files.items():
            (fresh / name).write_bytes(content.encode() if isinstance(content, str) else content)
