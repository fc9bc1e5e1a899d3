"""word2vec: vectors of words, by skip-gram with negative sampling, and what one can ask of them.

For a word ``c`` and a word ``o`` near it, the loss is ``-log s(u_o . v_c) - sum_n log s(-u_n . v_c)``, with a few words
``n`` drawn by frequency to the power 3/4. Frequent words are left out at random, and the distance up to which words are
near is drawn for each. Simplified: pairs are taken in batches, by Adam, instead of one after the other by gradient
descent.

Source:
    Mikolov et al. 2013, arXiv:1310.4546, sections 2.2 and 2.3; analogies: arXiv:1301.3781.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_lm.errors import CheckpointError, ConfigurationError, DataError
from lightning_lm.parts import Limit, Part
from lightning_lm.storage import check_digests, filling, where_from
from lightning_lm.storage.json_text import parse_json

__all__ = ["SkipGram", "WordVectors", "negative_sampling_loss", "skip_gram_pairs"]

_WORD = re.compile(r"[^\W\d_]+")
_NAME = "words.json"


def negative_sampling_loss(
    centers: Float[Tensor, "pairs features"],
    contexts: Float[Tensor, "pairs features"],
    negatives: Float[Tensor, "pairs drawn features"],
    *,
    collides: Int[Tensor, "pairs drawn"] | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Return the loss of skip-gram with negative sampling, summed over pairs.

    Args:
        centers: Vectors of the words that predict.
        contexts: Output vectors of the words near them.
        negatives: Output vectors of drawn words.
        collides: Drawn words that are the word near, and do not count; by default all count.

    Source:
        Mikolov et al. 2013, arXiv:1310.4546, equation 4.
    """
    drawn = F.logsigmoid(-(negatives @ centers[:, :, None])[..., 0])
    if collides is not None:
        drawn = drawn.masked_fill(collides.bool(), 0.0)
    return -F.logsigmoid((centers * contexts).sum(-1)).sum() - drawn.sum()


def skip_gram_pairs(
    tokens: NDArray[np.integer],
    ends: NDArray[np.int64],
    keep: NDArray[np.float64],
    *,
    window: int,
    generator: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs of words near each other inside a document: the word that predicts, and the predicted one.

    Args:
        tokens: Ids of the words of documents one after the other.
        ends: End of each document.
        keep: Probability with which an occurrence of each word stays in the text.
        window: Largest distance; the one of each word is drawn from 1 to it.
        generator: Source of the draws.
    """
    kept = generator.random(len(tokens)) < keep[tokens]
    words = tokens[kept].astype(np.int64)
    documents = np.searchsorted(ends, np.flatnonzero(kept), side="right")
    reach = generator.integers(1, window + 1, len(words))
    centers, contexts = [], []
    for distance in range(1, window + 1):
        left, right = slice(0, max(len(words) - distance, 0)), slice(distance, None)
        together = documents[left] == documents[right]
        for center, context in ((left, right), (right, left)):
            here = together & (reach[center] >= distance)
            centers.append(words[center][here])
            contexts.append(words[context][here])
    return np.concatenate(centers), np.concatenate(contexts)


@dataclass(frozen=True, kw_only=True)
class SkipGram(
    Part,
    limits={
        "d_model": Limit.COUNT, "window": Limit.COUNT, "negatives": Limit.COUNT, "min_count": Limit.COUNT,
        "epochs": Limit.COUNT, "batch_size": Limit.COUNT, "subsample": Limit.POSITIVE, "lr": Limit.POSITIVE,
    },
):  # fmt: skip
    """Settings of word2vec.

    Args:
        d_model: Features of a vector.
        window: Largest distance of words that are near each other.
        negatives: Drawn words for each pair.
        min_count: Occurrences of a word below which it is left out.
        subsample: Frequency from which on occurrences of a word are left out at random.
        epochs: Passes over the text.
        batch_size: Pairs of a step.
        lr: Learning rate at the beginning; it falls to zero in a straight line.
        seed: Seed of the vectors and of all draws.
    """

    d_model: int = 100
    window: int = 5
    negatives: int = 5
    min_count: int = 5
    subsample: float = 1e-3
    epochs: int = 5
    batch_size: int = 4096
    lr: float = 0.01
    seed: int = 0

    def train(self, texts: Iterable[str], *, advance: Callable[[float], None] = lambda _: None) -> "WordVectors":
        """Return the vectors of the words of a text, in lower case.

        Args:
            texts: Documents; they are read twice, so no generator.
            advance: Callback with the fraction of the work done since the last call.

        Raises:
            ConfigurationError: If the texts can be read only once.
            DataError: If no word is frequent enough.
        """
        if iter(texts) is texts:
            raise ConfigurationError("The texts are read twice; pass a list or a Source, not a generator.")
        counter = Counter(word for text in texts for word in _words(text))
        words = sorted((w for w, n in counter.items() if n >= self.min_count), key=lambda w: (-counter[w], w))
        if len(words) < 2:
            raise DataError(f"Fewer than two words occur min_count={self.min_count} times; lower it, or add text.")
        ids = {word: index for index, word in enumerate(words)}
        documents = [[ids[word] for word in _words(text) if word in ids] for text in texts]
        tokens, ends = np.array([i for d in documents for i in d], np.int64), np.cumsum([len(d) for d in documents])
        counts = np.array([counter[word] for word in words], np.float64)
        return WordVectors(words, self._fit(tokens, ends, counts, advance))

    def _fit(
        self,
        tokens: NDArray[np.int64],
        ends: NDArray[np.int64],
        counts: NDArray[np.float64],
        advance: Callable[..., None],
    ) -> NDArray[np.float32]:
        generator, torch_generator = np.random.default_rng(self.seed), torch.Generator().manual_seed(self.seed)
        size = 0.5 / self.d_model
        centers = nn.Embedding(len(counts), self.d_model)
        outputs = nn.Embedding(len(counts), self.d_model)
        nn.init.uniform_(centers.weight, -size, size, generator=torch_generator)
        nn.init.zeros_(outputs.weight)
        optimizer = torch.optim.Adam([*centers.parameters(), *outputs.parameters()], lr=self.lr, fused=True)
        ratio = self.subsample / (counts / counts.sum())
        keep, drawn = np.minimum(np.sqrt(ratio) + ratio, 1.0), np.cumsum(counts**0.75)
        for epoch in range(self.epochs):
            near = skip_gram_pairs(tokens, ends, keep, window=self.window, generator=generator)
            order = generator.permutation(len(near[0]))
            for begin in range(0, len(order), self.batch_size):
                batch = order[begin : begin + self.batch_size]
                done = (epoch + begin / len(order)) / self.epochs
                optimizer.param_groups[0]["lr"] = self.lr * (1.0 - done)
                shape = (len(batch), self.negatives)
                negatives = torch.from_numpy(np.searchsorted(drawn, generator.random(shape) * drawn[-1], side="right"))
                center, context = (torch.from_numpy(ids[batch]) for ids in near)
                loss = negative_sampling_loss(
                    centers(center), outputs(context), outputs(negatives), collides=negatives == context[:, None]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance(len(batch) / len(order) / self.epochs)
        vectors: NDArray[np.float32] = centers.weight.detach().numpy()
        return vectors


class WordVectors:
    """Vectors of words, compared by the cosine of their angle.

    Args:
        words: The words, the most frequent first.
        vectors: Their vectors, float [words, features].

    Raises:
        DataError: If there are not as many words as vectors.
    """

    def __init__(self, words: Sequence[str], vectors: NDArray[np.floating]) -> None:
        if vectors.ndim != 2 or len(words) != len(vectors):
            raise DataError(f"{len(words)} words need as many vectors, not an array of shape {vectors.shape}.")
        self.words, self.vectors = list(words), np.asarray(vectors, np.float32)
        self._ids = {word: index for index, word in enumerate(self.words)}
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        self._directions = self.vectors / np.maximum(lengths, 1e-12)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def nearest(self, word: str, count: int = 10) -> list[tuple[str, float]]:
        """Return the words with the most similar vectors, and the cosines.

        Args:
            word: A word of the vocabulary.
            count: Number of words.

        Raises:
            DataError: If the word is unknown.
        """
        return self._closest(self._direction(word), {word}, count)

    def analogy(self, first: str, second: str, third: str, count: int = 1) -> list[tuple[str, float]]:
        """Return what is to the third word as the second one is to the first: near ``second - first + third``.

        Args:
            first: Such as "man".
            second: Such as "king".
            third: Such as "woman".
            count: Number of words.

        Raises:
            DataError: If a word is unknown.
        """
        wanted = self._direction(second) - self._direction(first) + self._direction(third)
        return self._closest(wanted / max(float(np.linalg.norm(wanted)), 1e-12), {first, second, third}, count)

    def accuracy(self, questions: Iterable[Sequence[str]]) -> tuple[int, int, int]:
        """Return how many analogies are right, how many were asked, and how many have an unknown word.

        Args:
            questions: Four words each, of which the last is the right one.
        """
        right = asked = unknown = 0
        for *given, expected in questions:
            if any(word not in self for word in (*given, expected)):
                unknown += 1
                continue
            asked += 1
            first, second, third = given
            right += self.analogy(first, second, third)[0][0] == expected
        return right, asked, unknown

    def save(self, folder: Path | str) -> None:
        """Write the vectors into a folder, which no reader opens before it is complete.

        Args:
            folder: Created if needed.
        """
        with filling(Path(folder), known_by=(_NAME,)) as fresh:
            np.save(fresh / "vectors.npy", self.vectors, allow_pickle=False)
            (fresh / _NAME).write_text(json.dumps(self.words, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> "WordVectors":
        """Return the vectors in a folder.

        Args:
            folder: As `save` wrote it.

        Raises:
            CheckpointError: If there are none, or they are damaged.
        """
        folder = Path(folder)
        if not (folder / _NAME).is_file():
            raise CheckpointError(f"There are no word vectors at {folder} (it has no {_NAME}). {where_from(folder)}")
        check_digests(folder)
        try:
            words = parse_json((folder / _NAME).read_text(encoding="utf-8"))
            return cls(words, np.load(folder / "vectors.npy", allow_pickle=False))
        except (OSError, ValueError, EOFError, TypeError, DataError) as error:
            raise CheckpointError(f"The word vectors {folder} are damaged ({error}). Make them again.") from error

    def _direction(self, word: str) -> NDArray[np.float32]:
        if word not in self._ids:
            import difflib

            near = difflib.get_close_matches(word, self.words, n=1)
            raise DataError(
                f"{word!r} is none of the {len(self.words):,} words.{f' Did you mean {near[0]!r}?' if near else ''}"
            )
        direction: NDArray[np.float32] = self._directions[self._ids[word]]
        return direction

    def _closest(self, wanted: NDArray[np.float32], without: set[str], count: int) -> list[tuple[str, float]]:
        cosines = self._directions @ wanted
        cosines[[self._ids[word] for word in without]] = -np.inf
        best = np.argsort(-cosines, kind="stable")[: min(count, len(self.words) - len(without))]
        return [(self.words[index], float(cosines[index])) for index in best]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
