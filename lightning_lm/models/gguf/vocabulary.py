"""Tokenizers: the vocabulary in the metadata of a GGUF file to the files of a Hugging Face tokenizer, and back.

llama.cpp has byte-level byte-pair encoding (called ``gpt2``), which names its rule for splitting text into words, and
SentencePiece's byte-pair encoding (called ``llama``), which has scores in place of merges. Both become a
``tokenizer.json``.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_lm.errors import CheckpointError, TokenizerError
from lightning_lm.models.gguf.splitting import pre_tokenizer, splitting_name
from lightning_lm.models.huggingface.weights import read_json

__all__ = ["tokenizer_files", "vocabulary_metadata"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""
_PREFIX = "tokenizer.ggml."
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ADDS_BOS = ("llama-bpe", "tekken")
"""Splitting rules of models that begin every text with BOS where the file does not say so."""
_BLANK = "▁"
_NO_FORM = "llama.cpp knows byte-level BPE and SentencePiece BPE"


def tokenizer_files(metadata: Mapping[str, Any], source: object) -> dict[str, str]:
    """Return the contents of the tokenizer's files by their names, and of ``generation_config.json``.

    Args:
        metadata: Metadata of a GGUF file.
        source: The file, for messages.

    Raises:
        TokenizerError: If it has no vocabulary, or one of another kind.
    """
    kind, tokens, types = (metadata.get(_PREFIX + name) for name in ("model", "tokens", "token_type"))
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError(f"{source} has no vocabulary; name the model's tokenizer: --tokenizer FOLDER.")
    types = types if isinstance(types, list) and len(types) == len(tokens) else [NORMAL] * len(tokens)
    if kind == "gpt2":
        content = _byte_level(metadata, tokens, types, source)
    elif kind == "llama":
        content = _sentencepiece(metadata, tokens, types, source)
    else:
        raise TokenizerError(f"{source} has a vocabulary of kind {kind!r}; {_NO_FORM}. Name one: --tokenizer FOLDER.")
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_config(metadata, tokens), ensure_ascii=False, indent=2) + "\n",
        "generation_config.json": json.dumps(_generation(metadata), indent=2) + "\n",
    }


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: object) -> dict[str, Any]:
    rule = str(metadata.get(_PREFIX + "pre", "default"))
    model = {
        "type": "BPE",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": rule in _ADDS_BOS,
        "vocab": _vocab(tokens, types),
        "merges": [_pair(text, source) for text in metadata.get(_PREFIX + "merges") or ()],
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = {"normalizer": None, "pre_tokenizer": pre_tokenizer(rule, source), "decoder": decoder}
    return _tokenizer_json(metadata, tokens, types, model, steps, adds_bos=rule in _ADDS_BOS)


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: object) -> dict[str, Any]:
    scores = metadata.get(_PREFIX + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"{source} has a SentencePiece vocabulary without scores; name one: --tokenizer FOLDER.")
    vocab = _vocab(tokens, types)
    normal = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    prefixed = bool(metadata.get(_PREFIX + "add_space_prefix", True))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    model = {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": _merges_of_scores(normal, vocab),
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
    restore = {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "}
    decoders = [restore, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizers = [{"type": "Prepend", "prepend": _BLANK}, replace] if prefixed else [replace]
    steps = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    return _tokenizer_json(metadata, tokens, types, model, steps, adds_bos=True)


def _merges_of_scores(scores: Mapping[str, float], vocab: Mapping[str, int]) -> list[list[str]]:
    """Return the merges that give the pieces of a SentencePiece model, the one of the highest score first."""
    found: list[tuple[float, int, int, list[str]]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-score, vocab[left], vocab[right], [left, right]))
    return [pair for *_, pair in sorted(found)]


def _tokenizer_json(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    model: dict[str, Any],
    steps: dict[str, Any],
    *,
    adds_bos: bool,
) -> dict[str, Any]:
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    bos = metadata.get(_PREFIX + "bos_token_id")
    adds_bos = bool(metadata.get(_PREFIX + "add_bos_token", adds_bos)) and bos is not None
    processor = _bos_first(tokens[int(bos)], int(bos)) if adds_bos and bos is not None else None
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": processor,
    }
    return {**content, **steps, "model": {"dropout": None, **model}}


def _bos_first(token: str, index: int) -> dict[str, Any]:
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    special = {token: {"id": token, "ids": [index], "tokens": [token]}}
    second_bos = {"SpecialToken": {"id": token, "type_id": 1}}
    pair = [bos, first, second_bos, second]
    return {"type": "TemplateProcessing", "single": [bos, first], "pair": pair, "special_tokens": special}


def _vocab(tokens: list[str], types: list[int]) -> dict[str, int]:
    return {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}


def _pair(text: str, source: object) -> list[str]:
    left, blank, right = text.partition(" ")
    if not blank:
        raise CheckpointError(
            f"{source} has a merge without a blank between its parts: {text!r}; fetch the file again."
        )
    return [left, right]


def _config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in _NAMED.items():
        index = metadata.get(_PREFIX + key)
        if isinstance(index, int) and 0 <= index < len(tokens):
            config[name] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    return config if template is None else {**config, "chat_template": template}


def _generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
    found = {name: metadata[_PREFIX + key] for name, key in names.items() if _PREFIX + key in metadata}
    unique = list(dict.fromkeys(metadata[_PREFIX + key] for key in _ENDS if _PREFIX + key in metadata))
    return found if not unique else {**found, "eos_token_id": unique[0] if len(unique) == 1 else unique}


def vocabulary_metadata(folder: Path, rows: int, splitting: str | None = None) -> dict[str, Any]:
    """Return the metadata of a folder's tokenizer, to be written into a GGUF file.

    Args:
        folder: Folder with a ``tokenizer.json``.
        rows: Rows of the model's embedding; ids that the tokenizer lacks become unused tokens.
        splitting: Name that llama.cpp has for the rule by which words are split; ``None`` if it can be recognised.

    Raises:
        TokenizerError: If llama.cpp has no form for the tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{folder} has no tokenizer.json; {_NO_FORM}.")
    content = read_json(path)
    model = content["model"]
    if model.get("type") != "BPE":
        raise TokenizerError(f"The tokenizer in {folder} is a {model.get('type')} model; {_NO_FORM}.")
    ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in content["added_tokens"]}
    if max(ids.values()) >= rows:
        raise TokenizerError(
            f"The tokenizer in {folder} has ids up to {max(ids.values())}, the model {rows} embeddings."
        )
    normalizer = (content.get("normalizer") or {"type": "NFC"})["type"]
    if normalizer != "NFC" and not model.get("byte_fallback"):
        raise TokenizerError(
            f"The tokenizer in {folder} changes the text first ({normalizer}), which llama.cpp does not do."
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        found = _written_sentencepiece(content, ids, merges, rows)
    else:
        found = {
            "model": "gpt2",
            "pre": splitting or splitting_name(content["pre_tokenizer"], folder),
            "merges": merges,
        }
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    for token, index, kind in _typed(content, ids):
        tokens[index], types[index] = token, kind
    found |= {"tokens": tokens, "token_type": types, **_special_ids(folder, ids)}
    bos = found.get("bos_token_id")
    processor = json.dumps(content.get("post_processor"), ensure_ascii=False)
    found["add_bos_token"] = bos is not None and json.dumps(tokens[bos], ensure_ascii=False) in processor
    return {_PREFIX + name: value for name, value in found.items()} | _template(folder)


def _typed(content: Mapping[str, Any], ids: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    added = {token["content"]: CONTROL if token.get("special") else USER_DEFINED for token in content["added_tokens"]}
    model = content["model"]
    for token, index in ids.items():
        is_byte = bool(model.get("byte_fallback")) and len(token) == 6 and token.startswith("<0x")
        kind = BYTE if is_byte else UNKNOWN if token == model.get("unk_token") else added.get(token, NORMAL)
        yield token, index, kind


def _written_sentencepiece(
    content: Mapping[str, Any], ids: Mapping[str, int], merges: list[str], rows: int
) -> dict[str, Any]:
    """Return scores in the order of the merges: a piece that is merged earlier has the higher one."""
    scores = [-float(len(merges) + 1)] * rows
    for rank, pair in reversed(list(enumerate(merges))):
        scores[ids[pair.replace(" ", "", 1)]] = -float(rank)
    prefixed = "Prepend" in json.dumps(content.get("normalizer")) or _prefixes_space(content.get("pre_tokenizer"))
    return {"model": "llama", "scores": scores, "add_space_prefix": prefixed}


def _prefixes_space(step: Mapping[str, Any] | None) -> bool:
    return step is not None and step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"


def _special_ids(folder: Path, ids: Mapping[str, int]) -> dict[str, int]:
    config, generation = _json(folder / "tokenizer_config.json"), _json(folder / "generation_config.json")
    found: dict[str, int] = {}
    for name, key in _NAMED.items():
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            found[key] = ids[token]
    ends = list(_listed(generation.get("eos_token_id")))
    if ends:
        found["eos_token_id"] = ends[0] if found.get("eos_token_id") not in ends else found["eos_token_id"]
        others = [end for end in ends if end != found["eos_token_id"]]
        found |= dict(zip(_ENDS[1:], others, strict=False))
    if "bos_token_id" not in found and isinstance(generation.get("bos_token_id"), int):
        found["bos_token_id"] = generation["bos_token_id"]
    return found


def _listed(ids: Any) -> Iterable[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _template(folder: Path) -> dict[str, Any]:
    file = folder / "chat_template.jinja"
    template: Any = _json(folder / "tokenizer_config.json").get("chat_template")
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
