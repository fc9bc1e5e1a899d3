"""N-gram models on text: perplexity and bits per byte, like those of any other model, and names for ARPA files."""

from collections.abc import Iterable, Iterator

import numpy as np

from lightning_lm.errors import DataError
from lightning_lm.evals.perplexity import TextScore
from lightning_lm.models.ngram import NgramModel
from lightning_lm.protocols import Tokenizer
from lightning_lm.tokenizers.gpt2_files import to_letters

__all__ = ["evaluate_ngram", "token_words"]

_BATCH_CHARACTERS = 1 << 20
_END, _UNKNOWN, _START = "</s>", "<unk>", "<s>"


def evaluate_ngram(model: NgramModel, texts: Iterable[str], tokenizer: Tokenizer) -> TextScore:
    """Measure an n-gram model on documents: every token, the first one and the end of the document included.

    Args:
        model: The model.
        texts: Documents.
        tokenizer: The tokenizer of the model's ids.

    Raises:
        DataError: If there is no text, or the tokenizer has other ids.
    """
    if tokenizer.vocab_size != model.vocab_size:
        raise DataError(f"The tokenizer has {tokenizer.vocab_size:,} ids and the n-gram model {model.vocab_size:,}.")
    total = TextScore(0.0, 0, 0)
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int64)
    for batch in _batches(texts):
        documents = [np.append(ids.astype(np.int64), end) for ids in tokenizer.encode_batch(batch)]
        tokens, ends = np.concatenate(documents), np.cumsum([len(ids) for ids in documents])
        total = TextScore(
            total.nll_sum - float(model.log_probs(tokens, ends).sum()),
            total.num_tokens + len(tokens),
            (total.num_bytes or 0) + sum(len(text.encode()) for text in batch),
        )
    if not total.num_tokens:
        raise DataError("There is no text to measure. Check the path.")
    return total


def token_words(tokenizer: Tokenizer) -> list[str]:
    """Return a name without white space for each token id, as ARPA files need them.

    Text is in GPT-2's spelling, in which a space is ``Ġ``; the end of a document is ``</s>``, text outside the
    vocabulary ``<unk>``, and a token that is part of a character ``<id:N>``.

    Args:
        tokenizer: The tokenizer.
    """
    special = {index: name for name, index in tokenizer.special_tokens.items()}
    special.update(
        {
            index: name
            for index, name in ((tokenizer.eos_id, _END), (_unknown(tokenizer), _UNKNOWN))
            if index is not None
        }
    )
    taken = {*special.values(), _START, _END, _UNKNOWN}
    words = []
    for index in range(tokenizer.vocab_size):
        text = special.get(index, "")
        if not text or text.split() != [text]:
            text = tokenizer.decode([index])
            text = "" if "\ufffd" in text else to_letters(text.encode())
            text = f"<id:{index}>" if not text or text in taken else text
            taken.add(text)
        words.append(text)
    return words


def _unknown(tokenizer: Tokenizer) -> int | None:
    return getattr(tokenizer, "unk_id", None)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if not text:
            continue
        batch.append(text)
        size += len(text)
        if size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
