"""Runs of any module leave their point in the ledger, and the ledger is fitted as soon as there is enough."""

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lm.callbacks import Perplexity, ScalingLaw
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.scaling import RunLedger, RunRecord, measure_cost

ROWS = [(2, 9)] * 12


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "ledger.jsonl"


def test_a_foreign_module_leaves_its_run(path, foreign_module, batches_of, loader_of, trainer_with):
    trainer = trainer_with(Perplexity(), ScalingLaw(path, name="bigram"), max_epochs=1, log_every_n_steps=3)
    batches = loader_of(batches_of(ROWS, ignored=0.0))
    trainer.fit(foreign_module(), batches, loader_of(batches_of([(4, 9)])))
    (run,) = RunLedger(path).read()
    assert run.tokens == 12 * 2 * 8
    assert run.loss == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    assert run.loss_name == "val/loss"
    assert run.parameters["total"] == 2 * 8 * 256 + 256
    assert run.flops_per_token["products"] == 6 * 8 * 256
    assert [tokens for tokens, _ in run.curve] == [3 * 16, 6 * 16, 9 * 16, 12 * 16]
    assert (run.name, run.context_length, run.finished) == ("bigram", 8, True)
    assert run.wall_time_s > 0
    assert run.hyper_parameters["lr"] == 0.1
    assert {"torch", "lightning", "python"} <= set(run.versions)


def test_without_validation_the_training_loss_counts(path, foreign_module, batches_of, loader_of, trainer_with):
    losses = []

    class Module(foreign_module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    trainer = trainer_with(ScalingLaw(path), max_epochs=1, log_every_n_steps=4)
    trainer.fit(Module(), loader_of(batches_of(ROWS)))
    (run,) = RunLedger(path).read()
    assert run.loss_name == "train/loss"
    assert [loss for _, loss in run.curve] == pytest.approx([np.mean(losses[i : i + 4]) for i in (0, 4, 8)])
    assert run.loss == pytest.approx(np.mean(losses[8:]))


def test_our_module_gives_several_points_of_one_run(path, batches_of, loader_of, trainer_with):
    layer = Layer(mixer=Attention(num_heads=2))
    config = TransformerConfig(vocab_size=256, d_model=16, num_layers=1, layers=layer, context_length=8)
    law = ScalingLaw(path, at_tokens=[40, 100, 10_000], hyper_parameters={"width": 16}, convention="total")
    trainer = trainer_with(
        Perplexity(), law, max_epochs=1, log_every_n_steps=2, val_check_interval=2, check_val_every_n_epoch=None
    )
    batches = loader_of(batches_of(ROWS, ignored=0.0))
    trainer.fit(PretrainModule(config), batches, loader_of(batches_of([(4, 9)])))
    runs = RunLedger(path).read()
    assert [(run.tokens, run.finished) for run in runs] == [(64, False), (128, False), (192, True)]
    assert len({run.id for run in runs}) == 3
    assert runs[-1].flops_per_token == measure_cost(config, 8).flops_per_token
    assert runs[-1].hyper_parameters == {"width": 16}
    assert len(runs[-1].curve) == 6


def test_the_same_run_again_is_told_and_not_added(path, foreign_module, batches_of, loader_of, trainer_with):
    batches = loader_of(batches_of(ROWS))
    for _ in range(2):
        trainer = trainer_with(ScalingLaw(path, hyper_parameters={"lr": 0.1}), max_epochs=1)
        if RunLedger(path).read():
            with pytest.warns(UserWarning, match="already"):
                trainer.fit(foreign_module(), batches)
        else:
            trainer.fit(foreign_module(), batches)
    assert len(RunLedger(path)) == 1


def test_a_loss_that_is_no_number_is_told_and_not_added(path, foreign_module, batches_of, loader_of, trainer_with):
    class Module(foreign_module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.warns(UserWarning, match="Not recorded"):
        trainer_with(ScalingLaw(path), max_epochs=1).fit(Module(), loader_of(batches_of(ROWS)))
    assert RunLedger(path).read() == []


def test_a_resumed_run_counts_from_its_beginning(path, tmp_path, foreign_module, batches_of, loader_of, trainer_with):
    batches = batches_of(ROWS, ignored=0.0)
    whole = trainer_with(ScalingLaw(path, name="whole"), max_epochs=2, log_every_n_steps=4)
    whole.fit(foreign_module(), loader_of(batches))
    half = trainer_with(ScalingLaw(tmp_path / "other.jsonl"), max_epochs=1, log_every_n_steps=4)
    half.fit(foreign_module(), loader_of(batches))
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = trainer_with(ScalingLaw(path, name="resumed"), max_epochs=2, log_every_n_steps=4)
    rest.fit(foreign_module(), loader_of(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    first, second = RunLedger(path).read()
    assert second.tokens == first.tokens == 24 * 16
    assert [tokens for tokens, _ in second.curve] == [tokens for tokens, _ in first.curve]


def test_enough_runs_are_fitted_and_drawn(path, tmp_path, foreign_module, batches_of, loader_of, trainer_with):
    N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e2, 1e5, 4), np.geomspace(1e3, 1e6, 4)))
    for n, d in zip(N, D.round(), strict=True):
        loss = 1.0 + 9 / n**0.3 + 20 / d**0.4
        RunLedger(path).add(
            RunRecord(parameters={}, flops_per_token={"total": 6 * n}, tokens=int(d), loss=loss, name=f"{n} {d}")
        )
    board = TensorBoardLogger(tmp_path)
    trainer = trainer_with(ScalingLaw(path, convention="total"), logger=board, max_epochs=1)
    trainer.fit(foreign_module(), loader_of(batches_of(ROWS)))
    assert float(trainer.callback_metrics["scaling/alpha"]) == pytest.approx(
        0.3, rel=0.05
    )  # the 17th run is no such law's
    board.experiment.flush()
    events = EventAccumulator(board.log_dir, {"images": 0, "scalars": 0})
    events.Reload()
    assert {"scaling/frontier", "scaling/residuals", "scaling/contours"} <= set(events.Tags()["images"])
    assert "scaling/beta" in events.Tags()["scalars"]


def test_two_ranks_leave_one_run_with_the_loss_of_both(path, foreign_module, batches_of, loader_of, trainer_with):
    mine = {0: batches_of(ROWS[:6], ignored=0.0), 1: batches_of(ROWS[:6], ignored=0.0, seed=1)}

    class Module(foreign_module):
        def __init__(self):
            super().__init__()
            self.dropout.p = 0.0

        def train_dataloader(self):
            return loader_of(mine[self.global_rank])

    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    trainer = trainer_with(ScalingLaw(path), max_epochs=1, log_every_n_steps=3, **options)
    trainer.fit(Module())

    module, losses = Module(), []
    optimizer = module.configure_optimizers()
    for first, second in zip(mine[0], mine[1], strict=True):
        loss = (module.training_step(first, 0) + module.training_step(second, 0)) / 2
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (run,) = RunLedger(path).read()
    assert run.hyper_parameters["devices"] == 2
    first, second = pytest.approx(np.mean(losses[:3])), pytest.approx(np.mean(losses[3:]))
    assert run.curve == ((3 * 2 * 16, first), (6 * 2 * 16, second))
    assert run.loss == second
