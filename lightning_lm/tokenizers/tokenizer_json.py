"""Byte-level byte-pair encoding in Hugging Face's ``tokenizer.json``."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_lm.errors import TokenizerError
from lightning_lm.storage.json_text import parse_json
from lightning_lm.tokenizers.gpt2_files import from_letters, read_merges, to_letters
from lightning_lm.tokenizers.patterns import GPT2, GPT4, SplitPattern
from lightning_lm.tokenizers.vocabulary import Merge, Vocabulary

__all__ = ["ParsedTokenizer", "parse", "render", "render_config"]

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_BYTE_LEVEL_GPT2 = {**_BYTE_LEVEL, "use_regex": True}


class ParsedTokenizer(NamedTuple):
    """Byte-pair encoding of a ``tokenizer.json``."""

    merges: list[Merge]
    ids: dict[bytes, int]
    special_tokens: dict[str, int]
    pattern: SplitPattern


def render(vocabulary: Vocabulary, special_tokens: Mapping[str, int], pattern: SplitPattern) -> str:
    """Return the content of a ``tokenizer.json`` with which `tokenizers` gives the same ids."""
    vocab = {to_letters(token): number for token, number in vocabulary.ids.items()}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(name, number) for name, number in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": _render_pattern(pattern),
        "post_processor": None,
        "decoder": _BYTE_LEVEL_GPT2,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted({**vocab, **special_tokens}.items(), key=lambda item: item[1])),
            "merges": [[to_letters(left), to_letters(right)] for left, right in vocabulary.merges],
        },
    }
    return json.dumps(content, ensure_ascii=False)


def render_config(eos_token: str | None) -> str:
    """Return the content of a ``tokenizer_config.json``, with which `transformers` opens the folder."""
    content: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return json.dumps(content if eos_token is None else {**content, "eos_token": eos_token}, indent=1)


def parse(text: str) -> ParsedTokenizer:
    """Read the content of a ``tokenizer.json``.

    Raises:
        TokenizerError: If it is damaged, or not byte-level byte-pair encoding.
    """
    try:
        content = parse_json(text)
        model = content["model"]
        if model.get("type", "BPE") != "BPE":
            raise _not_supported(f"its model is {model['type']}")
        merges = read_merges(pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"])
        special = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or ()}
        pattern = _parse_pattern(content.get("pre_tokenizer"))
        _refuse_unknown(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"tokenizer.json is damaged: {error!r}.") from error
    ids = {from_letters(name): number for name, number in model["vocab"].items() if name not in special}
    if None in ids:
        raise _not_supported("its vocabulary does not spell bytes as GPT-2 does")
    return ParsedTokenizer(merges, {token: number for token, number in ids.items() if token}, special, pattern)


def _refuse_unknown(content: Mapping[str, Any]) -> None:
    model = content["model"]
    if content.get("normalizer"):
        raise _not_supported(f"it changes the text first ({content['normalizer'].get('type')})")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise _not_supported(f"its model sets {option}")
    for token in content.get("added_tokens") or ():
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise _not_supported(f"the added token {token['content']!r} takes the space around it")


def _not_supported(reason: str) -> TokenizerError:
    return TokenizerError(
        f"This tokenizer.json is no plain byte-level byte-pair encoding: {reason}. PretrainedTokenizer reads it."
    )


def _added_token(name: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": name, **flags}


def _render_pattern(pattern: SplitPattern) -> dict[str, Any]:
    if pattern == GPT2:
        return _BYTE_LEVEL_GPT2
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern.complete},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]}


def _parse_pattern(pre_tokenizer: Mapping[str, Any] | None) -> SplitPattern:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _not_supported(f"it splits text by {kinds}")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2
    expression = steps[0].get("pattern", {}).get("Regex", "")
    plain = (
        steps[0].get("behavior") == "Isolated" and not steps[0].get("invert") and not steps[-1].get("use_regex", True)
    )
    if kinds != ["Split", "ByteLevel"] or not expression or not plain:
        raise _not_supported(f"it splits text by {kinds}")
    known = next((pattern for pattern in (GPT2, GPT4) if pattern.expression == expression), None)
    return known or SplitPattern(expression)
