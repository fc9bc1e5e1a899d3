"""Special tokens that are written out in texts under `Plain`, which encodes them as the characters they consist of."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_lm.data.post_training.chat import ChatTemplate, Plain
from lightning_lm.protocols import Tokenizer

__all__ = ["writes_special", "written_special_report"]


def writes_special(record: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate) -> bool:
    """Tell whether a text of a record has a special token in it that is encoded as its characters.

    Args:
        record: Its texts are looked at if the template is `Plain`: other templates write special tokens themselves.
        tokenizer: Has the special tokens.
        template: Writes the record.
    """
    if not isinstance(template, Plain) or template.read_special:
        return False
    return any(token in text for text in _texts(record) for token in tokenizer.special_tokens)


def written_special_report(count: int) -> str:
    """Return the warning for a number of records.

    Args:
        count: Records with a special token in a text.
    """
    return (
        f"{count:,} records have a special token (such as an end of turn) written in their text, which Plain() encodes "
        "as ordinary characters. If it is meant as the token: --data.template Plain --data.template.read_special true"
    )


def _texts(record: Mapping[str, Any]) -> Iterator[str]:
    for field in ("prompt", "completion", "chosen", "rejected", "text"):
        if isinstance(record.get(field), str):
            yield record[field]
