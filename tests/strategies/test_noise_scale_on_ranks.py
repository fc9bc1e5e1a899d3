"""The noise scale where each rank has one micro-batch: its gradient before the average, and after it."""

import pytest
import torch
from quadratic_problem import DIM, NOISE_SCALE, SIGMA, Quadratic
from split_runs import STRATEGIES, model_config, trainer_for
from torch.utils.data import DataLoader

from lightning_lm.callbacks import GradientNoiseScale
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import SGD, Constant


def on_ranks(strategy, constant):
    """Every rank has one micro-batch of a step; rows beyond a rank's own belong to the others."""
    callback = GradientNoiseScale(memory=0.999)
    options = {"max_epochs": 1, "log_every_n_steps": 10, "use_distributed_sampler": False}
    trainer = trainer_for(STRATEGIES[strategy](), callbacks=[callback], **options)
    seed = torch.Generator().manual_seed(trainer.global_rank)
    model = Quadratic(constant)
    trainer.fit(model, DataLoader(SIGMA * torch.randn(4800, DIM, generator=seed), batch_size=12))
    assert not model.weight._backward_hooks
    return float(trainer.callback_metrics["noise/batch_size"])


@pytest.mark.parametrize(("strategy", "constant"), [("ddp", 1.0), ("zero1", 1e-4)])
def test_ranks_without_accumulation_come_within_ten_percent_too(ranks, strategy, constant):
    for found in ranks(2).run(on_ranks, strategy, constant):
        assert found == pytest.approx(NOISE_SCALE, rel=0.1)


def rows_of(rank):
    """One row that all ranks have, and one of their own."""
    return torch.stack([torch.randint(96, (13,), generator=torch.Generator().manual_seed(seed)) for seed in (9, rank)])


def our_module_on_ranks():
    options = {"callbacks": [GradientNoiseScale(memory=0.0)], "max_steps": 1, "log_every_n_steps": 1}
    trainer = trainer_for("ddp", use_distributed_sampler=False, **options)
    ids = rows_of(trainer.global_rank)
    batch = {"input_ids": ids, "labels": ids}
    module = PretrainModule(model_config(), optimizer=SGD(lr=0.0), schedule=Constant())
    torch.manual_seed(0)
    module.configure_model()
    trainer.fit(module, DataLoader([batch] * 2, batch_size=None))
    return float(trainer.callback_metrics["noise/batch_size"]), gradients_of(module)


def gradients_of(module):
    """Gradients of the mean over target tokens, rank by rank, by plain autograd."""
    flat = []
    for rank in range(2):
        ids = rows_of(rank)
        logits = module.model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        flat.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.model.parameters()))]))
    return torch.stack(flat).double()


def test_our_modules_on_ranks(ranks):
    """Of one step, with gradients taken anew: 24 target tokens on a rank, 48 in all."""
    for rank, (batch_size, own) in enumerate(ranks(2).run(our_module_on_ranks)):
        small, big = own[rank].square().sum(), own.mean(0).square().sum()
        signal, trace = (48 * big - 24 * small) / 24, (small - big) / (1 / 24 - 1 / 48)
        assert batch_size == pytest.approx(float(trace / signal), rel=1e-3)
