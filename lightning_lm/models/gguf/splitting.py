"""Rules for splitting text into words before byte-pair encoding, under the names that llama.cpp gives them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lm.errors import TokenizerError

__all__ = ["pre_tokenizer", "splitting_name"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {**_GPT2, "use_regex": False}


def _split(expression: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}
_RULES: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
    "smollm": _DIGITS,
}
"""``pre_tokenizer`` of a ``tokenizer.json`` by the name of the rule."""
_SAME = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "dbrx": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
    "jina-es": "gpt-2",
    "mpt": "gpt-2",
    "exaone4": "gpt-2",
    "stablelm2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "codeshell": "smollm",
    "exaone": "smollm",
    "minerva-7b": "smollm",
}
"""Names of rules that split like another one."""


def pre_tokenizer(name: str, source: object) -> dict[str, Any]:
    """Return the ``pre_tokenizer`` of a ``tokenizer.json`` for a rule.

    Args:
        name: ``tokenizer.ggml.pre`` of a GGUF file.
        source: The file, for the message.

    Raises:
        TokenizerError: If the rule is not known here.
    """
    rule = _RULES.get(_SAME.get(name, name))
    if rule is None:
        raise TokenizerError(
            f"{source} splits words by the rule {name!r}; known are {', '.join(sorted({*_RULES, *_SAME}))}. Name the "
            "model's own tokenizer instead: --tokenizer FOLDER."
        )
    return rule


def splitting_name(step: Mapping[str, Any] | None, folder: Path) -> str:
    """Return llama.cpp's name for the ``pre_tokenizer`` of a ``tokenizer.json``.

    Args:
        step: The ``pre_tokenizer``.
        folder: Folder of the tokenizer, for the message.

    Raises:
        TokenizerError: If llama.cpp has no such rule.
    """
    wanted = _meaning(step)
    for name, rule in _RULES.items():
        if _meaning(rule) == wanted:
            return name
    raise TokenizerError(
        f"llama.cpp has no name for the way in which the tokenizer in {folder} splits words: {json.dumps(step)[:200]}. "
        f"Known are {', '.join(_RULES)}; if one of its other rules does the same, name it: --splitting NAME."
    )


def _meaning(step: Mapping[str, Any] | None) -> Any:
    """Return what decides how a step splits."""
    if step is None:
        return None
    if step["type"] == "Sequence":
        found = [_meaning(part) for part in step["pretokenizers"]]
        return found[0] if len(found) == 1 else found
    if step["type"] == "Split":
        return "Split", step["pattern"].get("Regex"), step["behavior"], bool(step.get("invert"))
    if step["type"] == "ByteLevel":
        return "ByteLevel", bool(step.get("add_prefix_space")), bool(step.get("use_regex", True))
    return step["type"], bool(step.get("individual_digits"))
