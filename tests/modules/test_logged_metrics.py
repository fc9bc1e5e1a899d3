"""Lightning's own monitors, progress bars and loggers see the training loss and the hyper-parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from split_runs import Rows, model_config

from lightning_lm.modules import PretrainModule
from lightning_lm.optim import AdamW, Constant


def fit(tmp_path, *callbacks, steps=6, every=50, **options):
    torch.manual_seed(0)
    module = PretrainModule(model_config().build(), optimizer=AdamW(lr=0.01), schedule=Constant())
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
        "default_root_dir": tmp_path,
    }
    trainer = Trainer(max_steps=steps, log_every_n_steps=every, callbacks=list(callbacks), **(defaults | options))
    trainer.fit(module, Rows(trainer, steps, 96))
    return trainer, module


class Watch(Callback):
    """Keeps the loss that Lightning's metrics have, and the sums of the same batches in float64."""

    def __init__(self):
        self.seen, self.sums, self.window = [], [], [0.0, 0]

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        twin = copy.deepcopy(module.model).double()
        with torch.no_grad():
            logits = twin(batch["input_ids"][:, :-1])
        targets = batch["labels"][:, 1:].flatten()
        self.window[0] += float(F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
        self.window[1] += int((targets != -100).sum())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        names = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
        self.seen.append([float(getattr(trainer, name)["train/loss"]) for name in names])
        self.sums.append(self.window[0] / self.window[1])
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.window = [0.0, 0]


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (50, 1), (2, 2)])
def test_the_loss_is_in_lightnings_metrics_at_every_step(tmp_path, every, accumulate):
    """The mean over the target tokens since the last log, counted by hand."""
    watch = Watch()
    fit(tmp_path, watch, every=every, accumulate_grad_batches=accumulate)
    assert len(watch.seen) == 6
    for seen, expected in zip(watch.seen, watch.sums, strict=True):
        assert seen == pytest.approx([expected] * 3, rel=1e-5)


def test_early_stopping_and_checkpoints_watch_it_before_the_first_log(tmp_path):
    stopping = EarlyStopping("train/loss", stopping_threshold=100.0, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path, "best", monitor="train/loss", every_n_train_steps=2)
    watch = Watch()
    trainer, _ = fit(tmp_path, stopping, best, watch)
    assert stopping.stopped_epoch == trainer.current_epoch - 1 == 0
    assert float(best.best_model_score) == min(seen[0] for seen in watch.seen[1::2])


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_lightnings_own_bars_show_it_as_a_number(tmp_path, bar, capfd):
    trainer, _ = fit(tmp_path, bar(), enable_progress_bar=True, every=1)
    shown = format(trainer.progress_bar_metrics["train/loss"], ".2f")
    out, err = capfd.readouterr()
    line = (out + err).replace("\n", " ")
    assert "tensor" not in line
    assert shown in line
    assert "train/loss" in line


def test_hyper_parameters_reach_the_loggers_flat(tmp_path):
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")]
    fit(tmp_path, logger=loggers, steps=1)
    for logger in loggers:
        found = yaml.safe_load((tmp_path / logger.log_dir / "hparams.yaml").read_text())
        assert found["module"] == "PretrainModule"
        assert (found["optimizer"], found["optimizer/lr"], found["schedule"]) == ("AdamW", 0.01, "Constant")
        assert (found["model/d_model"], found["model/layers/mixer/num_heads"]) == (16, 4)
        assert found["trainer/max_steps"] == 1
        assert all(isinstance(value, int | float | str | bool) for value in found.values())
