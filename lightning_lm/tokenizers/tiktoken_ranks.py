"""Llama 3's ``tokenizer.model``: a list of tokens with their ranks, as tiktoken has it, and no SentencePiece model.

The file names neither the expression that splits text nor special tokens. Those of Llama 3 are known by the number of
its tokens; any other list of ranks is refused, because a guessed expression would silently give wrong ids.
"""

import base64
import binascii
import json
import re

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers.gpt2_files import to_letters
from lightning_lm.tokenizers.patterns import GPT4

__all__ = ["definition_of_ranks", "is_rank_file"]

_LLAMA_3 = 128_000
"""Ranks of Llama 3, 3.1, 3.2 and 3.3."""
_NUM_SPECIAL = 256
_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")


def is_rank_file(content: bytes) -> bool:
    """Tell whether a file is a list of tokens in base64, each with its rank.

    Args:
        content: The content of a ``tokenizer.model``.
    """
    return _LINE.match(content) is not None


def definition_of_ranks(content: bytes) -> dict[str, str]:
    """Return the ``tokenizer.json`` and ``tokenizer_config.json`` of Llama 3 that are equivalent to its ranks.

    Args:
        content: The content of its ``tokenizer.model``.

    Raises:
        TokenizerError: If the file is damaged, or of another model.
    """
    ranks = _parse(content)
    if len(ranks) != _LLAMA_3:
        raise TokenizerError(
            f"This is a list of {len(ranks):,} tiktoken ranks, and only Llama 3's ({_LLAMA_3:,}) is known: the "
            "file does not define how text is split. Use the tokenizer.json of the same model instead."
        )
    special = _special_tokens()
    begin, end = special[0], special[1]
    spelled = {token: to_letters(token) for token in ranks}
    model = {
        "type": "BPE",
        "ignore_merges": True,  # tiktoken takes a word that is a token as it is
        "vocab": {spelled[token]: rank for token, rank in ranks.items()},
        "merges": [[spelled[left], spelled[right]] for left, right in _merges(ranks)],
    }
    split = {"type": "Split", "pattern": {"Regex": GPT4.expression}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    prefix = {"SpecialToken": {"id": begin, "type_id": 0}}
    definition = {
        "version": "1.0",
        "added_tokens": [_added(name, len(ranks) + place) for place, name in enumerate(special)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [prefix, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [prefix, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {begin: {"id": begin, "ids": [len(ranks)], "tokens": [begin]}},
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": model,
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    return {"tokenizer.json": json.dumps(definition, ensure_ascii=False), "tokenizer_config.json": json.dumps(config)}


def _parse(content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in content.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(f"The list of tiktoken ranks is damaged in line {len(ranks) + 1}: {error}.") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError("The list of tiktoken ranks is damaged: ranks are missing, or a byte has none.")
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return every pair of tokens that is a token, by its rank: tiktoken merges whichever two have the lowest."""
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _special_tokens() -> list[str]:
    reserved = iter(f"<|reserved_special_token_{number}|>" for number in range(_NUM_SPECIAL))
    return [_SPECIAL.get(place) or next(reserved) for place in range(_NUM_SPECIAL)]


def _added(name: str, number: int) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": name, **flags}
