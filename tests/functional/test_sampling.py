"""The decoding options against transformers' logits processors and naive float64, and the draw against chi-square."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_lm.functional.sampling import (
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_counts,
    penalize_repetition,
    scale_by_temperature,
    verify_draft,
)

CHI_SQUARE_999 = {7: 24.32, 9: 27.88}
"""Upper 0.1 % points of the chi-square distribution by degrees of freedom (any statistics table)."""


def random_logits(batch: int = 4, vocab: int = 50, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def kept(logits: Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


def naive_top_p(row: Tensor, p: float) -> set[int]:
    probabilities = row.double().softmax(-1).tolist()
    chosen: set[int] = set()
    mass = 0.0
    for index in sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i)):
        if mass >= p and chosen:
            break
        chosen.add(index)
        mass += probabilities[index]
    return chosen


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
    def test_same_distribution_as_transformers(self, temperature):
        logits = random_logits()
        expected = TemperatureLogitsWarper(temperature)(torch.zeros(4, 1), logits).softmax(-1)
        torch.testing.assert_close(scale_by_temperature(logits, temperature).softmax(-1), expected)

    def test_zero_keeps_the_first_of_the_likeliest(self):
        assert kept(scale_by_temperature(torch.tensor([[1.0, 7.0, 7.0, -5.0]]), 0.0)) == [{1}]

    def test_tiny_temperature_of_huge_logits_is_finite(self):
        probabilities = scale_by_temperature(torch.tensor([[1e4, -1e4, -math.inf, 9999.0]]), 1e-38).softmax(-1)
        assert probabilities.tolist() == [[1.0, 0.0, 0.0, 0.0]]


class TestTopK:
    @pytest.mark.parametrize("k", [1, 5, 50])
    def test_equals_transformers(self, k):
        logits = random_logits()
        assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(torch.zeros(4, 1), logits))

    def test_more_than_the_vocabulary_keeps_all(self):
        logits = random_logits()
        assert torch.equal(keep_top_k(logits, 51), logits)

    def test_ties_with_the_last_stay(self):
        assert kept(keep_top_k(torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]]), 2)) == [{0, 2, 3, 4}]

    def test_excluded_tokens_stay_excluded(self):
        assert kept(keep_top_k(torch.tensor([[3.0, -math.inf, -math.inf]]), 2)) == [{0}]


class TestTopP:
    @pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
    def test_equals_transformers_and_naive(self, p):
        logits = random_logits(batch=16)
        ours = keep_top_p(logits, p)
        assert torch.equal(ours, TopPLogitsWarper(p)(torch.zeros(16, 1), logits))
        assert kept(ours) == [naive_top_p(row, p) for row in logits]

    @pytest.mark.parametrize("scale", [0.5, 4.0])
    @pytest.mark.parametrize("p", [0.5, 0.95])
    def test_large_vocabularies_flat_and_peaked(self, p, scale):
        logits = (random_logits(batch=3, vocab=3000, scale=scale) * 8).round() / 8  # many ties
        assert kept(keep_top_p(logits.double(), p)) == [naive_top_p(row, p) for row in logits]

    def test_rows_without_a_distribution_stay_so(self):
        logits = torch.tensor([[-math.inf] * 4, [math.nan] * 4])
        assert not keep_top_p(logits, 0.5).isfinite().any()

    def test_one_keeps_all(self):
        logits = random_logits()
        assert torch.equal(keep_top_p(logits, 1.0), logits)

    def test_ties_keep_the_lower_ids(self):
        assert kept(keep_top_p(torch.zeros(1, 8), 0.5)) == [{0, 1, 2, 3}]

    def test_mass_that_is_reached_exactly_is_enough(self):
        logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
        assert kept(keep_top_p(logits, 0.75)) == [{0, 1}]

    @pytest.mark.parametrize("scale", [1e4, -1e4])
    def test_extreme_logits_keep_one(self, scale):
        logits = torch.tensor([[scale, 0.0, -scale, -math.inf]])
        assert kept(keep_top_p(logits, 0.9)) == [{int(logits.argmax())}]

    def test_bfloat16_is_summed_in_float32(self):
        logits = torch.zeros(1, 4096, dtype=torch.bfloat16)
        assert len(kept(keep_top_p(logits, 0.5))[0]) == 2048


class TestMinP:
    @pytest.mark.parametrize("p", [0.001, 0.1, 1.0])
    def test_equals_transformers(self, p):
        logits = random_logits()
        assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(torch.zeros(4, 1), logits))

    def test_zero_keeps_all(self):
        logits = random_logits()
        assert torch.equal(keep_min_p(logits, 0.0), logits)

    def test_ties_with_the_likeliest_stay(self):
        assert kept(keep_min_p(torch.tensor([[1e4, -1e4, 1e4, -math.inf]]), 1.0)) == [{0, 2}]


class TestPenalties:
    @pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
    def test_repetition_equals_transformers(self, penalty):
        logits = random_logits()
        ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(1))
        seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        torch.testing.assert_close(penalize_repetition(logits, seen, penalty), expected, rtol=1e-7, atol=0)

    def test_a_seen_token_never_gets_likelier(self):
        logits = torch.tensor([[2.0, -2.0, 0.0, -math.inf]])
        penalized = penalize_repetition(logits, torch.ones(1, 4, dtype=torch.bool), 2.0)
        assert penalized.tolist() == [[1.0, -4.0, 0.0, -math.inf]]

    def test_counts_follow_the_formula(self):
        logits = random_logits(batch=3, vocab=6).double()
        counts = torch.tensor([[0, 1, 2, 3, 0, 9], [0] * 6, [1] * 6])
        expected = [
            [x - c * 0.3 - (1.0 if c > 0 else 0.0) * 0.7 for x, c in zip(row, row_counts, strict=True)]
            for row, row_counts in zip(logits.tolist(), counts.tolist(), strict=True)
        ]
        ours = penalize_counts(logits, counts, presence=0.7, frequency=0.3)
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=1e-15)

    def test_bfloat16_stays_bfloat16(self):
        logits = random_logits().bfloat16()
        assert penalize_counts(logits, torch.ones(4, 50, dtype=torch.int64), presence=1.0).dtype == torch.bfloat16


class TestDraw:
    def test_inverts_the_cumulative_distribution(self):
        logits = random_logits(batch=64, vocab=30).double()
        uniforms = torch.rand(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        expected = [
            int(np.searchsorted(np.cumsum(row.softmax(-1).numpy()), float(u), side="right"))
            for row, u in zip(logits, uniforms, strict=True)
        ]
        assert draw(logits, uniforms).tolist() == expected

    def test_frequencies_pass_chi_square(self):
        logits = random_logits(batch=1, vocab=10, scale=1.0, seed=5)
        samples = 20_000
        uniforms = torch.rand(samples, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        observed = draw(logits.expand(samples, -1), uniforms).bincount(minlength=10).double()
        expected = logits[0].double().softmax(-1) * samples
        assert ((observed - expected) ** 2 / expected).sum() < CHI_SQUARE_999[9]

    @pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
    def test_never_draws_an_excluded_token(self, uniform):
        logits = torch.tensor([[-math.inf, 1e4, -math.inf, 1e4, -math.inf]])
        assert draw(logits, torch.tensor([uniform], dtype=torch.float64)).item() in {1, 3}

    def test_a_float32_number_that_was_rounded_to_one_still_draws(self):
        assert draw(torch.zeros(1, 4), torch.ones(1)).tolist() == [3]

    def test_a_row_without_a_distribution_gives_no_token(self):
        logits = torch.tensor([[math.nan, 0.0], [-math.inf, -math.inf], [0.0, -math.inf]])
        assert draw(logits, torch.full((3,), 0.5, dtype=torch.float64)).tolist() == [2, 2, 0]

    def test_rare_tokens_of_a_large_vocabulary_are_reached(self):
        vocab = 200_000
        logits = torch.zeros(1, vocab)
        uniforms = torch.tensor([(vocab - 0.5) / vocab], dtype=torch.float64)
        assert draw(logits, uniforms).tolist() == [vocab - 1]

    def test_does_not_depend_on_other_rows(self):
        logits = random_logits(batch=6, vocab=100)
        uniforms = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        alone = [draw(logits[i : i + 1], uniforms[i : i + 1]).item() for i in range(6)]
        assert draw(logits, uniforms).tolist() == alone


class TestVerifyDraft:
    @pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
    def test_turns_one_distribution_into_the_other(self, scale):
        samples, generator = 20_000, torch.Generator().manual_seed(9)
        draft = random_logits(batch=1, vocab=8, scale=scale, seed=1).expand(samples, -1)
        wanted = random_logits(batch=1, vocab=8, scale=1.5, seed=2).expand(samples, -1)
        uniforms = torch.rand(samples, 3, generator=generator, dtype=torch.float64)
        ids, kept = verify_draft(wanted, draft, draw(draft, uniforms[:, 0]), uniforms[:, 1:])
        expected = wanted[0].double().softmax(-1)
        observed = ids.bincount(minlength=8).double()
        assert ((observed - expected * samples) ** 2 / (expected * samples)).sum() < CHI_SQUARE_999[7]
        overlap = torch.minimum(expected, draft[0].double().softmax(-1)).sum()  # what is kept, by the paper's theorem
        assert abs(kept.double().mean() - overlap) < 4 * math.sqrt(0.25 / samples)

    def test_a_perfect_draft_is_always_kept(self):
        logits = random_logits()
        ids = torch.tensor([0, 7, 49, 3])
        verified, kept = verify_draft(logits, logits, ids, torch.full((4, 2), 1 - 2**-53, dtype=torch.float64))
        assert kept.all()
        assert verified.tolist() == ids.tolist()

    def test_what_is_impossible_is_replaced(self):
        wanted, draft = torch.tensor([[-math.inf, 1e4, -math.inf]]), torch.tensor([[1e4, 0.0, -1e4]])
        verified, kept = verify_draft(wanted, draft, torch.tensor([0]), torch.zeros(1, 2))
        assert (verified.tolist(), kept.tolist()) == ([1], [False])

    def test_a_row_without_a_distribution_gives_no_token(self):
        verified, _ = verify_draft(
            torch.full((1, 3), math.nan), torch.zeros(1, 3), torch.tensor([0]), torch.zeros(1, 2)
        )
        assert verified.tolist() == [3]
