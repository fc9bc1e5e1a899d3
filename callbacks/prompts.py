"""Prompts that fit the data of a run: a question as the template writes it, or the beginning of a held-out text."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_lm.callbacks.hooks import Attempt
from lightning_lm.errors import ConfigurationError
from lightning_lm.protocols import Tokenizer
from lightning_lm.types import IGNORE_INDEX

__all__ = ["Prompt", "find_tokenizer", "sample_prompts"]

_MOST_CHARACTERS, _LEAST_CHARACTERS = 24, 3
_MOST_TOKENS = 256
_LOOKED_AT = 20


class Prompt(NamedTuple):
    """A text to continue."""

    text: str
    ids: list[int] | None = None
    """Its tokens, if special ones are among them, which in a text are ordinary letters."""


def find_tokenizer(trainer: Trainer, given: Tokenizer | None, callback: str) -> Tokenizer:
    """Return the tokenizer of a callback that reads texts: the one that it was given, or that of the data.

    Args:
        trainer: The running trainer.
        given: Tokenizer that the callback was given.
        callback: Its name, for the message.

    Raises:
        ConfigurationError: If there is none.
    """
    tokenizer = given or getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
    if tokenizer is None:
        raise ConfigurationError(
            f"{callback} found no tokenizer. Train with a datamodule that has one (TextDataModule), or give "
            f"{callback}(tokenizer=...)."
        )
    return tokenizer


def sample_prompts(trainer: Trainer, tokenizer: Tokenizer | None, count: int = 2) -> list[Prompt]:
    """Return short prompts of the kind that a model is trained on: code for code, questions for chats.

    They are the first prompts of the validation data, if it has some, else the beginnings of ``validation_texts()``.

    Args:
        trainer: The running trainer; its datamodule is asked.
        tokenizer: Tokenizer of the model.
        count: Most prompts.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    for prompts in (_questions(datamodule, tokenizer), _beginnings(datamodule)):
        found: dict[str, Prompt] = {}
        with Attempt():  # a user's own datamodule
            found = {prompt.text: prompt for prompt in islice(prompts, count)}
        if found:
            return list(found.values())
    return [Prompt("The ")]


def _questions(datamodule: Any, tokenizer: Tokenizer | None) -> Iterator[Prompt]:
    """Yield the prompts of the first validation batch: its texts, or each row's tokens before the first target."""
    if datamodule is None or tokenizer is None:
        return
    loader: Iterable[Any] = datamodule.val_dataloader()
    batch = next(iter(loader), None)
    if not isinstance(batch, Mapping):
        return
    if "texts" in batch:
        yield from (Prompt(text) for text in batch["texts"])
    elif "source_ids" in batch:
        for row, documents in zip(batch["source_ids"], batch["source_document_ids"], strict=True):
            ids = row[documents == 0][:_MOST_TOKENS].tolist()
            yield Prompt(tokenizer.decode([token for token in ids if token != tokenizer.eos_id]), ids)
    elif isinstance(batch.get("labels"), Tensor):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            first = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), 0)
            if 1 < first <= _MOST_TOKENS:
                yield _without_begin_mark(ids[:first], tokenizer)


def _without_begin_mark(ids: list[int], tokenizer: Tokenizer) -> Prompt:
    """Return a prompt as it is typed: `Generator` puts the mark of a text's beginning before it."""
    special = set(tokenizer.special_tokens.values())
    typed = ids[1:] if ids[0] in special else ids
    return Prompt(tokenizer.decode(typed), ids if special.intersection(typed) else None)


def _beginnings(datamodule: Any) -> Iterator[Prompt]:
    """Yield the first words of each text that is long enough; a prompt ends before a space or inside a long word."""
    texts: Iterable[str] = datamodule.validation_texts() if hasattr(datamodule, "validation_texts") else ()
    for text in islice(texts, _LOOKED_AT):
        line = next((line for line in text.splitlines() if len(line.strip()) >= _LEAST_CHARACTERS), "")
        start = line[:_MOST_CHARACTERS]
        if len(line) > len(start) and " " in start.strip():
            start = start[: start.rstrip().rindex(" ")]
        if start:
            yield Prompt(start)
