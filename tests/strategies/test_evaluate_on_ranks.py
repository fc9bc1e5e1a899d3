"""The scores of a model that ranks share are those of one process, and training is not changed."""

import functools

import pytest
import torch
from evaluation_stand_ins import Echo, NextLetter
from split_runs import STRATEGIES, model_config, run

from lightning_lm.callbacks import Evaluate
from lightning_lm.evals import LocalModel, Reverse
from lightning_lm.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyzAS \n0123456789")


def evaluated(strategy, counted=None):
    tasks = [NextLetter(count=6), Echo(), Reverse(num_items=4, num_samples=2, num_digits=2, max_new_tokens=3)]
    watched = Evaluate(tasks, every=2, max_share=0.99, batch_size=4, tokenizer=TOKENIZER)
    ask = LocalModel.log_likelihoods
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalModel, "log_likelihoods", lambda self, asked: counting(counted, asked) or ask(self, asked))
        *_, weights = run(STRATEGIES[strategy](), config=model_config(context_length=64), callbacks=[watched], steps=3)
    scores = [
        (item.id, {name: round(value, 5) for name, value in item.scores.items()})
        for task in watched.results.tasks
        for item in task.items
    ]
    return scores, weights


def counting(counted, requests):
    if counted is not None:
        counted.append(len(requests))


def evaluated_and_counted(strategy):
    counted = []
    return *evaluated(strategy, counted), counted[-1]


alone = functools.cache(evaluated)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "one"])
def test_scores_are_those_of_one_process(ranks, strategy):
    scores, weights = alone("one")
    found_by_ranks = ranks(2).run(evaluated_and_counted, strategy)
    # Two choices of six items: half of them for ranks with a whole model of their own.
    assert [count for *_, count in found_by_ranks] == [6 if strategy in ("ddp", "zero1", "zero2") else 12] * 2
    for found, found_weights, _ in found_by_ranks:
        assert found == scores
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, rtol=0, atol=1e-8)
