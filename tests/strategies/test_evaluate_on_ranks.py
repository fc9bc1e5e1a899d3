"""The scores of a model that ranks share are those of one process, and training is not changed."""

import functools

import pytest
import torch
from evaluation_stand_ins import Echo, NextLetter
from split_runs import STRATEGIES, model_config, run

from lightning_lm.callbacks import Evaluate
from lightning_lm.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyzAS \n0123456789")


def evaluated(strategy):
    tasks = [NextLetter(count=6), Echo()]
    watched = Evaluate(tasks, every=2, max_share=0.99, batch_size=4, tokenizer=TOKENIZER)
    *_, weights = run(STRATEGIES[strategy](), config=model_config(context_length=64), callbacks=[watched], steps=3)
    scores = [
        (item.id, {name: round(value, 5) for name, value in item.scores.items()})
        for task in watched.results.tasks
        for item in task.items
    ]
    return scores, weights


alone = functools.cache(evaluated)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "one"])
def test_scores_are_those_of_one_process(ranks, strategy):
    scores, weights = alone("one")
    for found, found_weights in ranks(2).run(evaluated, strategy):
        assert found == scores
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, rtol=0, atol=1e-8)
