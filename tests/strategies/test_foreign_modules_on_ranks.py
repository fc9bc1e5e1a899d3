"""Other people's modules under our strategies: on one process what they were, on two what DDP makes of them."""

import pytest
import torch
from foreign_modules import MODULES, loader_of
from split_runs import STRATEGIES, trainer_for

from lightning_lm.callbacks import EMA, LMProgressBar, LMSummary, LossSpike, MemoryReport, Perplexity, Throughput

AUTOMATIC = [name for name in MODULES if name not in ("GAN", "by hand")]


def trained(name, strategy):
    foreign = MODULES[name]
    torch.manual_seed(0)
    module = foreign.make()
    torch.manual_seed(1)
    callbacks = [EMA(0.5), LMProgressBar(), LMSummary(), LossSpike(), MemoryReport(), Perplexity(), Throughput()]
    trainer = trainer_for(STRATEGIES[strategy](), max_steps=3, callbacks=callbacks, enable_progress_bar=True)
    seed = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    trainer.fit(module, loader_of(foreign, 3, seed=seed), loader_of(foreign, 1))
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AUTOMATIC)
def test_two_ranks_train_what_ddp_trains(name, ranks):
    expected = ranks(2).run(trained, name, "ddp")[0]
    for strategy in ("zero1", "zero2"):
        for found in ranks(2).run(trained, name, strategy):
            for key, weight in expected.items():
                if "running" not in key:  # statistics of a rank's own batches
                    torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5)
