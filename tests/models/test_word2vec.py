"""word2vec: the loss and its gradient by the formula, the pairs one by one, words of a kind near each other."""

import math

import numpy as np
import pytest
import torch

from lightning_lm.cli import main
from lightning_lm.errors import CheckpointError, ConfigurationError, DataError
from lightning_lm.models.word2vec import SkipGram, WordVectors, negative_sampling_loss, skip_gram_pairs


def test_loss_and_gradient_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    v, u = (torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    n = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    collides = torch.tensor([[False, False], [True, False], [False, False]])
    loss = negative_sampling_loss(v, u, n, collides=collides)
    loss.backward()
    expected, gradient = 0.0, np.zeros((3, 4))
    for pair in range(3):
        center, near = v[pair].tolist(), u[pair].tolist()
        rows = [(near, 1.0)] + [(n[pair, i].tolist(), -1.0) for i in range(2) if not collides[pair, i]]
        for row, sign in rows:
            probability = 1 / (1 + math.exp(-sign * sum(a * b for a, b in zip(center, row, strict=True))))
            expected -= math.log(probability)
            gradient[pair] -= sign * (1 - probability) * np.array(row)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(v.grad.numpy(), gradient, rtol=0, atol=1e-12)


def test_pairs_stay_inside_documents_and_windows():
    tokens, ends = np.arange(12), np.array([5, 6, 12])
    centers, contexts = skip_gram_pairs(tokens, ends, np.ones(12), window=3, generator=np.random.default_rng(0))
    reach = np.random.default_rng(0)
    reach.random(12)
    reach = reach.integers(1, 4, 12)
    document = [0] * 5 + [1] + [2] * 6
    expected = {
        (i, j) for i in range(12) for j in range(12) if i != j and document[i] == document[j] and abs(i - j) <= reach[i]
    }
    found = list(zip(centers.tolist(), contexts.tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected
    centers, contexts = skip_gram_pairs(
        tokens, ends, (tokens != 7).astype(float), window=1, generator=np.random.default_rng(0)
    )
    assert (6, 8) in set(zip(centers.tolist(), contexts.tolist(), strict=True))  # neighbours once 7 is left out


@pytest.fixture(scope="module")
def texts():
    """Sentences in which words of a kind are interchangeable."""
    generator = np.random.default_rng(1)
    animals, colours, verbs = (
        ["cat", "dog", "cow", "horse"],
        ["red", "green", "blue", "white"],
        ["runs", "sits", "eats"],
    )
    return [
        f"The {generator.choice(colours)} {generator.choice(animals)} {generator.choice(verbs)}. "
        f"{generator.choice(animals)} {generator.choice(verbs)} fast, paint it {generator.choice(colours)}!"
        for _ in range(600)
    ]


@pytest.fixture(scope="module")
def vectors(texts):
    return SkipGram(d_model=12, window=2, epochs=8, batch_size=512, min_count=3, subsample=1.0, lr=0.03).train(texts)


def test_words_of_a_kind_are_near(vectors):
    for kind in ("cat dog cow horse", "red green blue white", "runs sits eats"):
        words = kind.split()
        for word in words:
            near = [other for other, _ in vectors.nearest(word, len(words) - 1)]
            assert set(near) == set(words) - {word}
    cosines = [cosine for _, cosine in vectors.nearest("cat", 4)]
    assert cosines == sorted(cosines, reverse=True)


def test_training_is_repeated_by_the_seed(texts):
    settings = SkipGram(d_model=4, epochs=1)
    first, second = settings.train(texts[:50]), settings.train(texts[:50])
    np.testing.assert_array_equal(first.vectors, second.vectors)
    parts = []
    settings.train(texts[:50], advance=parts.append)
    assert sum(parts) == pytest.approx(1.0)


def test_analogies_by_hand(tmp_path):
    vectors = WordVectors(
        ["man", "king", "woman", "queen", "fish"], np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [-1, 0, 0.0]])
    )
    assert vectors.analogy("man", "king", "woman")[0][0] == "queen"
    questions = [["man", "king", "woman", "queen"], ["man", "king", "woman", "fish"], ["man", "king", "x", "queen"]]
    assert vectors.accuracy(questions) == (1, 2, 1)
    vectors.save(tmp_path / "v")
    again = WordVectors.load(tmp_path / "v")
    assert again.nearest("man", 9) == vectors.nearest("man", 9)
    with pytest.raises(DataError, match=r"'quen' is none of the 5 words\. Did you mean 'queen'"):
        vectors.nearest("quen")
    (tmp_path / "v" / "vectors.npy").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="has changed"):
        WordVectors.load(tmp_path / "v")


def test_input_that_cannot_be_used_is_refused():
    with pytest.raises(ConfigurationError, match="window=0"):
        SkipGram(window=0)
    with pytest.raises(ConfigurationError, match="read twice"):
        SkipGram().train(iter(["a b"]))
    with pytest.raises(DataError, match="min_count=5"):
        SkipGram().train(["one two three"])
    with pytest.raises(DataError, match="as many vectors"):
        WordVectors(["a"], np.zeros((2, 3)))


def test_the_verb(tmp_path, texts, capsys):
    (tmp_path / "text.txt").write_text("\n".join(texts))
    (tmp_path / "questions.txt").write_text(": kinds\nCat dog red green\ncat dog zebra green\n")
    output = str(tmp_path / "v")
    options = ["--epochs", "1", "--d-model", "8", "--nearest", "cat", "--analogy", "cat", "dog", "red"]
    assert main(["word2vec", "--input", str(tmp_path / "text.txt"), "--output", output, *options]) == 0
    shown = capsys.readouterr().out
    assert "words of 8 features, written to" in shown
    assert shown.count(" 0.") + shown.count(" 1.") >= 5
    assert main(["word2vec", "--vectors", output, "--questions", str(tmp_path / "questions.txt")]) == 0
    assert "of 1 right" in capsys.readouterr().out
    assert main(["word2vec", "--output", output]) == 2
    assert main(["word2vec", "--input", str(tmp_path / "text.txt"), "--output", output]) == 1
    assert "is not empty" in capsys.readouterr().err
