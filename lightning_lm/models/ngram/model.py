"""N-gram language models: probabilities of known n-grams, and weights of their shorter selves for all others.

The form is that of ARPA files (Katz 1987): the probability of the longest known n-gram, times the back-off weight of
each longer context that is known. Interpolated models have it too, their n-grams hold the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.models.ngram.codes import CHUNK, find, insert_starts, walk

__all__ = ["NgramModel", "Table"]


@dataclass(frozen=True)
class Table:
    """All n-grams of one order, in the order of their codes.

    Args:
        codes: int64, sorted; see `lightning_lm.models.ngram.codes`.
        log_probs: Log-probability of the last symbol after the others, float64. Nats.
        log_backoffs: Log-weight of the order below for symbols unknown after this n-gram, float64. Nats.
    """

    codes: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    log_backoffs: NDArray[np.float64]


class NgramModel:
    """An n-gram language model over token ids. A document begins behind a start symbol of its own.

    Args:
        tables: Tables of the orders 1, 2, ...; the first has a row for every id, and a last one for the start.

    Example:
        >>> import numpy as np
        >>> from lightning_lm.models import fit_ngram
        >>> text = np.frombuffer(b"to be or not to be", np.uint8)
        >>> model = fit_ngram([(text, np.array([len(text)]))], order=3, vocab_size=256)
        >>> model.log_probs(text).shape
        (18,)
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tuple(tables)

    @property
    def order(self) -> int:
        """Symbols of the longest n-gram, the predicted one included."""
        return len(self.tables)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.tables[0].codes) - 1

    @property
    def num_ngrams(self) -> tuple[int, ...]:
        """Known n-grams of each order."""
        return tuple(len(table.codes) for table in self.tables)

    def log_probs(self, tokens: NDArray[np.integer], ends: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Return the log-probability of each token after those before it in its document. Nats.

        Args:
            tokens: Token ids of documents one after the other.
            ends: End of each document; one document by default.

        Raises:
            DataError: If an id is outside the vocabulary.
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise DataError(f"Token ids {tokens.min()} to {tokens.max()} are not all in range({self.vocab_size}).")
        text = insert_starts(tokens, np.array([len(tokens)]) if ends is None else ends, self.vocab_size)
        context = self.order - 1
        parts = [
            self._scores(text[max(begin - context, 0) : begin + CHUNK])[min(begin, context) :]
            for begin in range(0, len(text), CHUNK)
        ]
        scores: NDArray[np.float64] = np.concatenate(parts)[text != self.vocab_size]
        return scores

    def next_log_probs(self, context: Sequence[int]) -> NDArray[np.float64]:
        """Return the log-probability of every id after the beginning of a document, float64 [vocab_size]. Nats.

        Args:
            context: Token ids from the start of the document; the last ``order - 1`` of them matter.
        """
        symbols = np.array([self.vocab_size, *context], np.int64)
        logs = self.tables[0].log_probs[:-1].copy()
        for length in range(1, min(len(symbols), self.order - 1) + 1):
            row = self._row(symbols[-length:])
            if row < 0:
                continue
            logs += self.tables[length - 1].log_backoffs[row]
            above, base = self.tables[length], self.vocab_size + 1
            begin, end = np.searchsorted(above.codes, (row * base, (row + 1) * base))
            logs[above.codes[begin:end] - row * base] = above.log_probs[begin:end]
        return logs

    def sample(
        self,
        prompt: Sequence[int] = (),
        *,
        max_tokens: int,
        seed: int,
        temperature: float = 1.0,
        eos_id: int | None = None,
    ) -> list[int]:
        """Return a continuation of the beginning of a document.

        Args:
            prompt: Token ids from the start of the document.
            max_tokens: Tokens to draw at most.
            seed: Seed of the draws.
            temperature: Divides the log-probabilities; 0 takes the most probable id.
            eos_id: Id that ends the document.

        Raises:
            ConfigurationError: If the temperature is negative.
        """
        if not temperature >= 0:
            raise ConfigurationError(f"temperature={temperature} must be at least 0.")
        generator, ids = np.random.default_rng(seed), list(prompt)
        while len(ids) < len(prompt) + max_tokens and (eos_id is None or ids[len(prompt) :][-1:] != [eos_id]):
            logs = self.next_log_probs(ids)
            if temperature == 0:
                ids.append(int(logs.argmax()))
                continue
            weights = np.exp((logs - logs.max()) / temperature)
            ids.append(int(generator.choice(len(weights), p=weights / weights.sum())))
        return ids[len(prompt) :]

    def _scores(self, text: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the log-probability of each symbol of a text, as far as it reaches back."""
        scores = self.tables[0].log_probs[text]
        codes = [table.codes for table in self.tables[1:]]
        for length, (rows, prefixes) in enumerate(walk(codes, text, self.vocab_size + 1)):
            has_context, is_known = prefixes >= 0, rows >= 0
            scores[has_context] += self.tables[length].log_backoffs[prefixes[has_context]]
            scores[is_known] = self.tables[length + 1].log_probs[rows[is_known]]
        return scores

    def _row(self, symbols: NDArray[np.int64]) -> int:
        """Return the row of an n-gram in its table, -1 if it is unknown."""
        row = symbols[:1]
        for table, symbol in zip(self.tables[1:], symbols[1:], strict=False):
            row = find(table.codes, np.where(row < 0, -1, row * (self.vocab_size + 1) + symbol))
        return int(row[0])
