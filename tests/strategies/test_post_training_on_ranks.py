"""Every objective of post-training under every strategy: the weights of one process, from ragged answers."""

import functools

import pytest
import torch
from post_training_runs import KINDS, train
from split_runs import STRATEGIES

TOLERANCE = 2e-6
"""Float32 sums in another order, over three steps."""


@functools.cache
def alone(kind):
    return train(kind, "one")


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_one_process(ranks, kind, strategy):
    weights, metrics = alone(kind)
    for found, logged in ranks(2).run(train, kind, strategy):
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=TOLERANCE)
        for name in ("train/loss", "train/grad_norm"):
            assert logged[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6)
