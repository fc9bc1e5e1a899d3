"""Any tokenizer that comes as a Hugging Face ``tokenizer.json``."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import MissingDependencyError, TokenizerError
from lightning_lm.tokenizers import tokenizer_json
from lightning_lm.tokenizers.base import CHAT_TEMPLATE, BaseTokenizer, as_list, refuse_surrogates
from lightning_lm.tokenizers.gpt2_files import from_letters
from lightning_lm.tokenizers.patterns import SplitPattern

if TYPE_CHECKING:
    import tokenizers
from lightning_lm.storage.json_text import parse_json

__all__ = ["PretrainedTokenizer"]

_FILES = ("tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE)
TOKEN_MAP = "special_tokens_map.json"
_SPACES = ("\u0120", "\u010a", "\u0109", "\u2581", " ", "\n", "\t")
"""First letters of tokens that begin with white space: in byte-level vocabularies, SentencePiece, and plain text."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class PretrainedTokenizer(BaseTokenizer):
    """A ``tokenizer.json``, run by the `tokenizers` library, with the chat template that came with it.

    ``encode`` adds no special tokens of its own: what begins and ends a document is decided where the data is made.

    Args:
        definition: The content of ``tokenizer.json``.
        config: The content of ``tokenizer_config.json``: names of special tokens, chat template.
        chat_template: The content of ``chat_template.jinja``, where the template has a file of its own.
    """

    def __init__(self, definition: str, *, config: str = "{}", chat_template: str | None = None) -> None:
        self._files = dict(zip(_FILES, (definition, config, chat_template), strict=True))
        self._config = _json(config, "tokenizer_config.json")
        named = [_content(self._config.get(name)) for name in ("bos_token", "eos_token")]
        self._allowing = _tokenizer(definition, named)
        self._ordinary = _tokenizer(definition, named)
        self._ordinary.encode_special_tokens = True
        self._definition = _json(definition, "tokenizer.json")
        added = self._allowing.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        eos_token = _content(self._config.get("eos_token"))
        super().__init__(special, eos_token if eos_token in special else None)
        self._vocab_size = max(self._allowing.get_vocab().values(), default=-1) + 1
        self.bos_id = special.get(_content(self._config.get("bos_token")) or "")
        """Id of the token that the files name as the begin of a text, if they name one; see also `prefix_ids`."""
        self.unk_id = _unknown_id(self._definition, self._allowing)
        self._pattern = self._cut_pattern()
        self.chat_template = self._published_template = chat_template or _template_of(self._config)
        self.tool_use_template = _named_templates(self._config).get("tool_use")
        """The template for conversations with tools, where several have been published under names."""

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a ``tokenizer.json`` and the files beside it; ``path`` is the file or its folder."""
        path = Path(path)
        folder = path.parent if path.is_file() else path
        found = {name: folder / name for name in (*_FILES, TOKEN_MAP) if (folder / name).is_file()}
        if path.is_file():
            found["tokenizer.json"] = path
        return cls.from_files({name: file.read_text(encoding="utf-8") for name, file in found.items()})

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> Self:
        """Return the tokenizer that `to_files` described."""
        if "tokenizer.json" not in files:
            raise TokenizerError("tokenizer.json is missing: these files are no complete tokenizer.")
        return cls(
            files["tokenizer.json"],
            config=_with_token_map(files.get("tokenizer_config.json", "{}"), files.get(TOKEN_MAP)),
            chat_template=files.get("chat_template.jinja"),
        )

    def to_files(self) -> dict[str, str]:
        """Return the content of the files, as they came; with another chat template if that was set."""
        files = {name: content for name, content in self._files.items() if content is not None}
        if self.chat_template is not None and self.chat_template != self._published_template:
            files[CHAT_TEMPLATE] = self.chat_template
        return files

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._vocab_size

    @property
    def prefix_ids(self) -> list[int]:
        """Ids that the definition puts before every text, such as Llama's ``<s>``; `encode` leaves them out."""
        return list(self._allowing.encode("", add_special_tokens=True).ids)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of a text. Special tokens written in it are ordinary text unless allowed."""
        refuse_surrogates(text)
        tokenizer = self._allowing if allow_special else self._ordinary
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Return the ids of each text, as uint16 where the vocabulary allows it and uint32 otherwise."""
        for text in texts:
            refuse_surrogates(text)
        encodings = self._ordinary.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=self._dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self._allowing.decode(as_list(ids, self.vocab_size), skip_special_tokens=False))

    def token_byte_lengths(self) -> NDArray[np.int64]:
        """Return int64 [vocab_size]: UTF-8 bytes of text that each id stands for, 0 for special tokens.

        Exact for byte-level vocabularies and for those that write a space as a mark. Vocabularies that drop spaces have
        no exact lengths; theirs are the lengths of the tokens as written.
        """
        byte_level = "ByteLevel" in json.dumps(self._definition.get("decoder"))
        added = self._allowing.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, number in self._allowing.get_vocab().items():
            lengths[number] = len(token.encode()) if number in added else _length(token, byte_level=byte_level)
        lengths[list(self._special.values())] = 0
        return lengths

    def word_starts(self) -> NDArray[np.bool_]:
        """Return bool [vocab_size]: False for tokens that continue a word.

        In WordPiece these have a mark, such as ``##``; elsewhere they are the tokens without a space before them.
        """
        model = self._definition.get("model", {})
        piece = model.get("type") == "WordPiece"
        mark = str(model.get("continuing_subword_prefix") or "##") if piece else ""
        starts = np.ones(self.vocab_size, dtype=np.bool_)
        for token, number in self._allowing.get_vocab().items():
            starts[number] = not token.startswith(mark) if piece else token.startswith(_SPACES)
        starts[list(self._special.values())] = True
        return starts

    @property
    def named_tokens(self) -> dict[str, str]:
        """Special tokens by the names under which chat templates read them, such as ``bos_token``."""
        named = {name: _content(self._config.get(name)) for name in _NAMED_TOKENS}
        extra = self._config.get("extra_special_tokens")
        named |= {name: _content(token) for name, token in extra.items()} if isinstance(extra, dict) else {}
        return {name: token for name, token in named.items() if token is not None}

    def _no_template(self) -> TokenizerError:
        return TokenizerError(
            "This tokenizer has no chat template: tokenizer_config.json has none and there is no "
            "chat_template.jinja. Set the attribute chat_template to one."
        )

    def _extended(self, tokens: Sequence[str]) -> Self:
        from tokenizers import AddedToken

        longer = _tokenizer(self._files["tokenizer.json"] or "", [])
        longer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        return self.from_files({**self.to_files(), "tokenizer.json": longer.to_str()})

    def _encode_ordinary(self, text: str) -> list[int]:
        return list(self._ordinary.encode(text, add_special_tokens=False).ids)

    def _last_cut(self, text: str) -> int:
        return self._pattern.last_cut(text) if self._pattern else 0

    def _cut_pattern(self) -> SplitPattern | None:
        """Return the pattern that splits text, where that is all that happens to it before merges are applied."""
        added = self._allowing.get_added_tokens_decoder().values()
        if any(not token.special or token.lstrip or token.rstrip for token in added):
            return None
        try:
            return tokenizer_json.parse(self._files["tokenizer.json"] or "").pattern
        except TokenizerError:
            return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.to_files())


def _rebuild(cls: type[PretrainedTokenizer], files: dict[str, str]) -> PretrainedTokenizer:
    return cls.from_files(files)


def _tokenizer(definition: str, special: Sequence[str | None]) -> "tokenizers.Tokenizer":
    """Return a tokenizer in which the named tokens are special, even if the definition has them as ordinary ones."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError("tokenizers", "run a tokenizer.json", "hf") from error
    model = _json(definition, "tokenizer.json").get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise TokenizerError("tokenizer.json has no model with a vocabulary: it is damaged, or of another kind.")
    try:
        tokenizer = Tokenizer.from_str(definition)
    except Exception as error:  # tokenizers raises nothing more specific
        raise TokenizerError(f"tokenizer.json is damaged, or of a newer version of tokenizers: {error}.") from error
    tokenizer.add_special_tokens([name for name in special if name and tokenizer.token_to_id(name) is not None])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json(text: str, name: str) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise TokenizerError(f"{name} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{name} contains a {type(content).__name__}, not an object.")
    return content


def _with_token_map(config: str, token_map: str | None) -> str:
    """Return a configuration that also names the special tokens which ``special_tokens_map.json`` alone names."""
    if token_map is None:
        return config
    known, named = _json(config, "tokenizer_config.json"), _json(token_map, TOKEN_MAP)
    missing = {name: named[name] for name in _NAMED_TOKENS if named.get(name) and not known.get(name)}
    return json.dumps({**known, **missing}, ensure_ascii=False) if missing else config


def _content(token: Any) -> str | None:
    """Return a special token that stands in a file by itself or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _template_of(config: Mapping[str, Any]) -> str | None:
    named = _named_templates(config)
    return named.get("default") or next(iter(named.values()), None)


def _named_templates(config: Mapping[str, Any]) -> dict[str, str]:
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {} if template is None else {"default": template}


def _unknown_id(definition: Mapping[str, Any], tokenizer: "tokenizers.Tokenizer") -> int | None:
    model = definition.get("model", {})
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else tokenizer.token_to_id(token)


def _length(token: str, *, byte_level: bool) -> int:
    if byte_level:
        spelled = from_letters(token)
        return len(token.encode()) if spelled is None else len(spelled)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.removeprefix("##").replace("\u2581", " ").encode())
