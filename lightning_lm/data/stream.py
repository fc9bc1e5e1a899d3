"""Endless rows of training data, each a pure function of the corpus, the seed and its index.

Nothing is drawn and nothing is remembered: row 1,000,000 is found without the rows before it. A position in the data
is therefore one integer, and resuming, sharing rows among ranks and reproducing a run need nothing else.
"""

import functools
import hashlib
import json
from collections.abc import Mapping

import numpy as np

from lightning_lm.data.mixture import Interleaving
from lightning_lm.data.packed_rows import Ints, Rows, StoreRows, blank_rows
from lightning_lm.data.packing import BestFit, Packing
from lightning_lm.data.permutation import key_of
from lightning_lm.data.store import TokenStore
from lightning_lm.errors import ConfigurationError

__all__ = ["TokenStream"]


class TokenStream:
    """Rows of packed documents from one store or a weighted mixture of stores.

    Each epoch of a store shows every row once, in a new order. A row has ``input_ids``, ``labels``,
    ``position_ids`` and ``document_ids``, all int64, as `lightning_lm.types.TokenBatch` describes.

    Args:
        stores: A store, or stores with weights: the fraction of the rows from each.
        row_length: Tokens of a row: one more than the positions the model sees.
        packing: Layout of documents in rows.
        seed: Seed of the order.
        shuffle: False keeps documents and rows in the order of the store.

    Raises:
        ConfigurationError: If a row is shorter than two tokens, or a weight is not positive.
        DataError: If a store has no row.
    """

    def __init__(
        self,
        stores: TokenStore | Mapping[TokenStore, float],
        *,
        row_length: int,
        packing: Packing | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if row_length < 2:
            raise ConfigurationError(f"A row needs at least 2 tokens, a context and a target; got {row_length}.")
        if not isinstance(stores, TokenStore | Mapping):
            raise ConfigurationError(
                f"A {type(stores).__name__} is no token store. Make one with tokenize(texts, tokenizer, folder), or of "
                "ids that are there already with write_store(ids, documents, folder)."
            )
        weights = {stores: 1.0} if isinstance(stores, TokenStore) else dict(stores)
        self.row_length = row_length
        self.packing = packing or BestFit()
        self.seed = seed
        self.shuffle = shuffle
        self._order = Interleaving(list(weights.values()))
        self._corpora = [
            StoreRows(store, self.packing, row_length, key_of(seed, number) if shuffle else None)
            for number, store in enumerate(weights)
        ]
        self.rows_per_epoch = sum(corpus.num_rows for corpus in self._corpora)

    def __getitem__(self, index: int) -> Rows:
        """Return one row, each field int64 [row_length]."""
        return {name: values[0] for name, values in self.batch(np.array([index])).items()}

    def batch(self, indices: Ints) -> Rows:
        """Return the rows with these indices, each field int64 [rows, row_length]."""
        rows = blank_rows(len(indices), self.row_length)
        sources, numbers = self._order.locate(indices)
        for source in np.unique(sources):
            places = np.flatnonzero(sources == source)
            self._corpora[source].fill(rows, places, numbers[places])
        return rows

    def padding(self, num_rows: int) -> Rows:
        """Return rows without target tokens."""
        return blank_rows(num_rows, self.row_length)

    @property
    def num_targets(self) -> int:
        """Targets in one epoch of every store."""
        return sum(corpus.num_targets for corpus in self._corpora)

    @functools.cached_property
    def description(self) -> dict[str, object]:
        """Everything that decides the rows, by name; two streams are equal if and only if these are equal."""
        return {
            "corpus": [corpus.store.fingerprint for corpus in self._corpora],
            "mixture": self._order.counts.tolist(),
            "row_length": self.row_length,
            "packing": self.packing.to_dict(),
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of `description`."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()
