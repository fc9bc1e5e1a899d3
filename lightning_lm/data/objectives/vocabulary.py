"""Facts about a vocabulary that objectives need: ids that may be hidden, starts of words, mask, sentinels, modes."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import Tokenizer

__all__ = ["MASK", "SENTINELS", "Vocabulary"]

MASK = "<|mask|>"
"""The mask token of tokenizers that a run trains."""
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
"""The special tokens that stand for removed spans, named as in T5."""
_MASKS = (MASK, "[MASK]", "<mask>", "<MASK>")
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Vocabulary(NamedTuple):
    """Token ids by their use; see `of`."""

    ordinary: NDArray[np.int64]
    """Ids that stand for text: no special, unknown or unused ones."""
    starts_word: NDArray[np.bool_]
    """bool [vocab_size], True for ids that begin a word."""
    special: dict[str, int]
    """Special tokens and their ids."""
    mask: str | None
    """Name of the mask token, if there is one."""
    sentinels: NDArray[np.int64]
    """Ids of the tokens that stand for removed spans, in the order in which they are used."""
    eos_id: int | None
    """Id that ends a text."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Return the facts about a tokenizer's ids.

        Args:
            tokenizer: Any tokenizer; one without ``word_starts`` has words of one token.
        """
        special = dict(tokenizer.special_tokens)
        lengths = np.asarray(tokenizer.token_byte_lengths()).copy()
        unknown = getattr(tokenizer, "unk_id", None)
        lengths[[*special.values(), *([] if unknown is None else [unknown])]] = 0
        numbered = sorted(
            (int(match.group(1)), number) for name, number in special.items() if (match := _SENTINEL.fullmatch(name))
        )
        named = getattr(tokenizer, "named_tokens", {}).get("mask_token")
        starts = getattr(tokenizer, "word_starts", None)
        return cls(
            ordinary=np.flatnonzero(lengths),
            starts_word=np.ones(len(lengths), dtype=np.bool_) if starts is None else np.asarray(starts()),
            special=special,
            mask=next((name for name in (named, *_MASKS) if name in special), None),
            sentinels=np.array([number for _, number in numbered], dtype=np.int64),
            eos_id=tokenizer.eos_id,
        )

    @property
    def mask_id(self) -> int:
        """Id of the mask token.

        Raises:
            ConfigurationError: If there is none.
        """
        if self.mask is None:
            raise ConfigurationError(
                f"The tokenizer has no mask token; its special tokens are {_brief(list(self.special))}. "
                f"{_addition(MASK)}"
            )
        return self.special[self.mask]

    def id_of(self, token: str) -> int:
        """Return the id of a special token.

        Args:
            token: Its name.

        Raises:
            ConfigurationError: If there is none of that name.
        """
        if token not in self.special:
            raise ConfigurationError(
                f"The tokenizer has no special token {token!r}; it has {_brief(list(self.special))}. {_addition(token)}"
            )
        return self.special[token]

    def require_sentinels(self, count: int) -> None:
        """Refuse a vocabulary with fewer sentinels than a text may need.

        Args:
            count: Most spans that are removed from one text.

        Raises:
            ConfigurationError: If there are fewer.
        """
        if count > len(self.sentinels):
            raise ConfigurationError(
                f"Up to {count} spans are removed from one text, and the tokenizer has {len(self.sentinels)} of the "
                "tokens <extra_id_0>, <extra_id_1>, ... that stand for them. Shorten the texts (context_length), "
                f"lengthen the spans (mean_span), or add tokens: "
                f"tokenizer.with_special_tokens([f'<extra_id_{{i}}>' for i in range({count})])."
            )


def _addition(token: str) -> str:
    return (
        f"Add it: tokenizer.with_special_tokens([{token!r}]), or train one that has it: "
        f"TrainBPE(special_tokens=('<|endoftext|>', {token!r}))."
    )


def _brief(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:6])
    return (shown or "none") + (f" and {len(names) - 6} more" if len(names) > 6 else "")
