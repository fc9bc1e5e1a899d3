"""Small texts of token ids, as token stores have them."""

import numpy as np


def text_of(documents):
    """Return documents' ids one after the other, and where each ends."""
    return np.concatenate([np.asarray(d, np.uint16) for d in documents]), np.cumsum([len(d) for d in documents])


def random_documents(seed, vocab_size, sizes):
    """Return documents of these sizes, whose ids are the rarer the larger."""
    generator = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, vocab_size + 1)
    return [generator.choice(vocab_size, size, p=weights / weights.sum()).tolist() for size in sizes]
