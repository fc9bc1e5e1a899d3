"""Every objective of post-training under every strategy: the weights of one process, from ragged answers."""

import functools

import pytest
import torch
from post_training_runs import KINDS, train
from split_runs import STRATEGIES, run

from lightning_lm.callbacks import Adapters, LoRA
from lightning_lm.errors import ConfigurationError

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


def adapters_on_the_head(strategy):
    with pytest.raises(ConfigurationError) as caught:
        run(STRATEGIES[strategy](), callbacks=[LoRA(Adapters(targets=("head", "q")))])
    return str(caught.value)


def test_an_adapter_on_what_cannot_be_split_with_it(ranks):
    for said in ranks(2).run(adapters_on_the_head, "tp2"):
        assert "model.head carries an adapter, and its role 'head' cannot be split with one" in said
