"""The order of the sampling options, and that rows of a batch do not touch each other."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Sampling
from lightning_lm.generation.sampling import Sampler
from lightning_lm.parts import Part

ALL_OPTIONS = Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.02, repetition_penalty=1.3, seed=3)


def sampler(sampling, prompts=((1,),), keys=None, max_new_tokens=8):
    keys = [(i, 0) for i in range(len(prompts))] if keys is None else keys
    return Sampler(sampling, prompts, keys=keys, max_new_tokens=max_new_tokens)


def choices(sampling, logits, prompts, keys=None):
    """All steps' choices, [steps][rows], for logits [steps, rows, vocab]."""
    worker = sampler(sampling, prompts, keys, max_new_tokens=len(logits))
    return [worker.choose(step).tolist() for step in logits]


class TestSettings:
    def test_round_trip_as_plain_data(self):
        assert Part.from_dict(ALL_OPTIONS.to_dict()) == ALL_OPTIONS

    @pytest.mark.parametrize(
        "wrong",
        [
            {"temperature": -0.1},
            {"temperature": math.nan},
            {"top_k": 0},
            {"top_p": 0.0},
            {"top_p": 1.1},
            {"min_p": -0.1},
            {"min_p": 1.5},
            {"repetition_penalty": 0.0},
            {"seed": -1},
        ],
    )
    def test_a_value_out_of_range_is_named(self, wrong):
        (name,) = wrong
        with pytest.raises(ConfigurationError, match=name):
            Sampling(**wrong)

    def test_defaults_change_nothing(self):
        logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(Sampling().truncate(logits).softmax(-1), logits.softmax(-1))


def test_truncation_equals_the_processors_of_transformers():
    logits = torch.randn(8, 60, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.randint(0, 60, (8, 9), generator=torch.Generator().manual_seed(1))
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.02),
        ]
    )
    worker = sampler(ALL_OPTIONS, ids.tolist())
    ours = ALL_OPTIONS.truncate(worker._penalize(logits))
    torch.testing.assert_close(ours.softmax(-1), processors(ids, logits.clone()).softmax(-1))


class TestPenaltiesOverSteps:
    def test_equal_a_plain_count(self):
        sampling = Sampling(temperature=0, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3)
        prompts = [[1, 2, 2], [5]]
        steps = torch.randn(30, 2, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        ours = choices(sampling, steps, prompts)
        for row, prompt in enumerate(prompts):
            answer: list[int] = []
            for step in range(30):
                scores = []
                for token, logit in enumerate(steps[step, row].float().tolist()):
                    if token in prompt + answer:
                        logit = logit / 1.2 if logit > 0 else logit * 1.2
                    scores.append(logit - 0.4 * (token in answer) - 0.3 * answer.count(token))
                answer.append(scores.index(max(scores)))
            assert [column[row] for column in ours] == answer

    def test_survive_rows_that_leave(self):
        sampling = Sampling(temperature=0, frequency_penalty=1.0)
        worker = sampler(sampling, [[0], [0]])
        logits = torch.tensor([[0.0, 0.5, 0.2], [0.0, 0.2, 0.5]])
        assert worker.choose(logits).tolist() == [1, 2]
        worker.select(torch.tensor([1]))
        assert worker.choose(logits[1:]).tolist() == [1]


class TestRowsAreIndependent:
    def test_of_the_other_rows(self):
        logits = torch.randn(6, 4, 50, generator=torch.Generator().manual_seed(0))
        prompts = [[1], [2], [3], [4]]
        together = choices(ALL_OPTIONS, logits, prompts)
        for row in range(4):
            alone = choices(ALL_OPTIONS, logits[:, row : row + 1], prompts[row : row + 1], [(row, 0)])
            assert [column[row] for column in together] == [column[0] for column in alone]

    def test_of_rows_that_leave(self):
        logits = torch.randn(6, 3, 50, generator=torch.Generator().manual_seed(0))
        together = choices(ALL_OPTIONS, logits, [[1], [2], [3]])
        worker = sampler(ALL_OPTIONS, [[1], [2], [3]])
        worker.choose(logits[0])
        worker.select(torch.tensor([2, 0]))
        rest = [worker.choose(step[[2, 0]]).tolist() for step in logits[1:]]
        assert rest == [[column[2], column[0]] for column in together[1:]]

    def test_of_the_length_asked_for(self):
        logits = torch.randn(20, 1, 50, generator=torch.Generator().manual_seed(0))
        assert choices(ALL_OPTIONS, logits, [[1]])[:5] == choices(ALL_OPTIONS, logits[:5], [[1]])

    @pytest.mark.parametrize("keys", [[(0, 0), (0, 1)], [(0, 0), (1, 0)]])
    def test_yet_differ_between_prompts_and_samples(self, keys):
        columns = choices(Sampling(seed=0), torch.zeros(30, 2, 1000), [[1], [1]], keys)
        assert sum(a == b for a, b in columns) <= 1

    def test_seeds_differ(self):
        first, second = (choices(Sampling(seed=s), torch.zeros(30, 1, 1000), [[1]]) for s in (0, 1))
        assert sum(a == b for a, b in zip(first, second, strict=True)) <= 1


class TestGreedy:
    def test_takes_the_lowest_of_equal_ids(self):
        assert choices(Sampling(temperature=0), torch.tensor([[[1.0, 4.0, 4.0]]]), [[0]]) == [[1]]

    @pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(seed=0)])
    def test_rows_without_a_valid_logit_give_the_id_behind_the_vocabulary(self, sampling):
        logits = torch.tensor([[[math.nan] * 3, [-math.inf] * 3, [-1e4, 1e4, -math.inf]]])
        assert choices(sampling, logits, [[0], [0], [0]]) == [[3, 3, 1]]

    def test_bfloat16(self):
        logits = torch.tensor([[[1e4, -1e4, 9e3]]], dtype=torch.bfloat16)
        assert choices(Sampling(temperature=0), logits, [[0]]) == [[0]]
        assert choices(Sampling(seed=0, top_p=0.9, frequency_penalty=0.1), logits, [[0]]) == [[0]]
