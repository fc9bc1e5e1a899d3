"""The strategy to read trains as torch's own wrapper does, however gradients travel."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from optimizer_runs import Run, fit, in_a_loop

from lightning_lm.errors import ConfigurationError
from lightning_lm.strategies import DataParallelStrategy


def trained(run, folder, exchange):
    strategy = DataParallelStrategy(exchange, bucket_bytes=1500) if exchange else DDPStrategy()
    return fit(run, strategy, folder)


@pytest.mark.parametrize("exchange", ["naive", "flat", "bucketed"])
@pytest.mark.parametrize(("accumulate", "partial", "clip"), [(1, 0, None), (4, 2, 0.05)])
def test_equal_to_ddp_and_to_one_process(ranks, tmp_path, exchange, accumulate, partial, clip):
    run = Run("adamw", accumulate=accumulate, partial=partial, clip=clip, double=True)
    found, wanted = ranks(2).run(trained, run, tmp_path, exchange), ranks(2).run(trained, run, tmp_path, None)
    alone = in_a_loop(run)
    for name, value in wanted[0].items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[0][name], alone[name], rtol=1e-8, atol=1e-10)


def test_three_ranks(ranks, tmp_path):
    run = Run("sgd", double=True)
    alone = in_a_loop(run)
    for found in ranks(3).run(trained, run, tmp_path, "bucketed"):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


def test_settings_of_the_wrapper_are_refused():
    with pytest.raises(ConfigurationError, match="has no static_graph"):
        DataParallelStrategy(static_graph=True)
