"""Examples that come as token ids, with the tokens to train on named by ``labels`` or a mask, as TRL and axolotl do."""

from collections.abc import Mapping
from typing import Any

from lightning_lm.data.post_training.chat import Rendered
from lightning_lm.errors import DataError
from lightning_lm.protocols import Tokenizer
from lightning_lm.types import IGNORE_INDEX

__all__ = ["encode_tokens", "token_ids"]

_MASKS = ("completion_mask", "assistant_masks", "loss_mask")


def encode_tokens(record: Mapping[str, Any], tokenizer: Tokenizer) -> Rendered:
    """Return token ids as they came, and which of them are trained on: all, unless ``labels`` or a mask is there.

    Padding, by ``attention_mask``, is taken off.

    Args:
        record: Has ``input_ids``; may have ``labels``, ``completion_mask``, ``assistant_masks``, ``loss_mask`` and
            ``attention_mask``, each as long.
        tokenizer: The one that the ids were made with.

    Raises:
        DataError: If an id is not in the vocabulary, or lengths or labels do not fit; names field and position.
    """
    ids = token_ids(record, "input_ids", tokenizer)
    learned = [True] * len(ids)
    if record.get("labels") is not None:
        labels = _as_long(record, "labels", len(ids))
        _refuse_shifted(labels, ids)
        learned = [label != IGNORE_INDEX for label in labels]
    for name in _MASKS:
        if record.get(name) is not None:
            mask = _as_long(record, name, len(ids))
            learned = [before and bool(kept) for before, kept in zip(learned, mask, strict=True)]
    if record.get("attention_mask") is not None:
        real = _as_long(record, "attention_mask", len(ids))
        ids = [token for token, kept in zip(ids, real, strict=True) if kept]
        learned = [mask for mask, kept in zip(learned, real, strict=True) if kept]
    return Rendered(ids, learned)


def token_ids(record: Mapping[str, Any], field: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a field.

    Args:
        record: Has the field.
        field: Its name.
        tokenizer: The one that the ids were made with.

    Raises:
        DataError: If these are no ids of its vocabulary.
    """
    ids = _integers(record, field)
    unknown = next((place for place, token in enumerate(ids) if not 0 <= token < tokenizer.vocab_size), None)
    if unknown is not None:
        raise DataError(
            f"{field}[{unknown}] is {ids[unknown]}, and the tokenizer has {tokenizer.vocab_size:,} ids. Use the "
            "tokenizer that the ids were made with: --data.tokenizer LoadTokenizer --data.tokenizer.path FOLDER"
        )
    return ids


def _integers(record: Mapping[str, Any], field: str) -> list[int]:
    values = record[field]
    values = values.tolist() if hasattr(values, "tolist") else values  # numpy and torch
    if not isinstance(values, list | tuple) or not all(isinstance(value, int) for value in values):
        raise DataError(f"{field} is {str(values)[:60]!r}; a flat list of integers is needed.")
    return [int(value) for value in values]


def _as_long(record: Mapping[str, Any], field: str, length: int) -> list[int]:
    values = _integers(record, field)
    if len(values) != length:
        raise DataError(f"{field} has {len(values)} entries and input_ids {length}; both must have as many.")
    return values


def _refuse_shifted(labels: list[int], ids: list[int]) -> None:
    pairs = enumerate(zip(labels, ids, strict=True))
    other = next((place for place, (label, token) in pairs if label not in (IGNORE_INDEX, token)), None)
    if other is not None:
        raise DataError(
            f"labels[{other}] is {labels[other]} and input_ids[{other}] is {ids[other]}; a label is the id at its own "
            f"position (not shifted), or {IGNORE_INDEX} if the token is not trained on."
        )
