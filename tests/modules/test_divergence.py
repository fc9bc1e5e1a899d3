"""Runs that diverge stop, say at which step, and leave the last good checkpoint; counters of a run begin with it."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_lm.callbacks import LastCheckpoint
from lightning_lm.errors import DivergenceError
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import SGD, AdamW, Constant, Linear


class Poisoned(PretrainModule):
    """The gradient of one step is not finite, and its loss neither if wanted."""

    value, step, loss_too = math.nan, 4, False

    def training_loss(self, batch):
        loss = super().training_loss(batch)
        if self.trainer.global_step != self.step - 1:
            return loss
        nll_sum = loss.nll_sum * self.value if self.loss_too else loss.nll_sum
        return loss._replace(loss_sum=loss.loss_sum * self.value, nll_sum=nll_sum)


def poisoned(config, **attributes):
    module = Poisoned(config, optimizer=SGD(lr=0.1), schedule=Constant())
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def finite(path):
    saved = torch.load(path, weights_only=True)
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    return saved


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("every", "good"), [(1, 3), (2, 2), (3, 3), (4, None), (100, None)])
def test_the_last_good_checkpoint_stays(config, row_data, make_trainer, tmp_path, value, clip, every, good):
    """Step 4 of 8 is bad, and nothing is logged before the end."""
    last = LastCheckpoint(every, dirpath=tmp_path)
    settings = {"max_steps": 8, "log_every_n_steps": 50, "limit_val_batches": 0, "enable_checkpointing": True}
    trainer = make_trainer(**settings, callbacks=[last], gradient_clip_val=clip)
    with pytest.raises(DivergenceError, match=r"not finite.*resume from the last one.*NonFinite"):
        trainer.fit(poisoned(config, value=value), datamodule=row_data())
    if good is None:
        assert not list(tmp_path.rglob("*.ckpt"))
    else:
        assert finite(tmp_path / "last.ckpt")["global_step"] == good


@pytest.mark.parametrize(
    ("settings", "clip", "said"),
    [
        ({}, 1.0, "gradient norm of step 4"),
        ({}, None, "loss of step 5"),  # the weights are lost, which the next loss shows
        ({"loss_too": True}, None, "loss of step 4"),
    ],
)
def test_it_is_seen_at_the_next_log_interval(config, row_data, make_trainer, settings, clip, said):
    trainer = make_trainer(max_steps=8, log_every_n_steps=3, limit_val_batches=0, gradient_clip_val=clip)
    with pytest.raises(DivergenceError, match=said):
        trainer.fit(poisoned(config, **settings), datamodule=row_data())
    assert trainer.global_step == 5  # the sixth step is not taken


def test_and_at_the_end(config, row_data, make_trainer):
    trainer = make_trainer(max_steps=5, log_every_n_steps=50, limit_val_batches=0)
    with pytest.raises(DivergenceError, match="loss of step 5"):
        trainer.fit(poisoned(config), datamodule=row_data())


def test_a_scaler_of_gradients_may_meet_infinities(config, row_data, make_trainer):
    """It searches its scale: the first steps overflow, and are left out by it."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = make_trainer(max_steps=8, log_every_n_steps=1, limit_val_batches=0, plugins=[plugin])
    trainer.fit(PretrainModule(config, optimizer=SGD(lr=0.1)), datamodule=row_data())
    assert scaler.get_scale() < 2.0**40


class Plain(LightningModule):
    """Somebody else's module; a buffer that holds an infinity is none of our business."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        return loss * math.nan if self.trainer.global_step == 3 else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_module_keeps_its_good_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=6, callbacks=[LastCheckpoint(1, dirpath=tmp_path)], enable_checkpointing=True)
    with pytest.raises(DivergenceError, match=r"After step 4 the weights layer\.weight, layer\.bias are not finite"):
        trainer.fit(Plain(), DataLoader(torch.randn(32, 4), batch_size=4))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_checkpoints_of_lightning_are_guarded_for_our_modules(config, row_data, make_trainer, tmp_path):
    keeps = ModelCheckpoint(tmp_path, filename="only", every_n_train_steps=1, enable_version_counter=False)
    trainer = make_trainer(max_steps=8, limit_val_batches=0, callbacks=[keeps], enable_checkpointing=True)
    with pytest.raises(DivergenceError):
        trainer.fit(poisoned(config), datamodule=row_data())
    assert finite(tmp_path / "only.ckpt")["global_step"] == 3


# --- each run counts for itself ---


def rates_of(module, trainer, data):
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    trainer.fit(module, datamodule=data)
    return rates


def test_a_second_run_starts_its_schedule_again(config, row_data, make_trainer, tmp_path):
    module = PretrainModule(config, optimizer=AdamW(lr=1.0), schedule=Linear(horizon_tokens=80))
    first, second = (rates_of(module, make_trainer(max_steps=6, limit_val_batches=0), row_data()) for _ in range(2))
    assert first == second
    assert first[0] == 1.0
    assert first[-1] == 0.0
    fresh = PretrainModule(config, optimizer=AdamW(lr=1.0), schedule=Linear(horizon_tokens=80))
    trainer = make_trainer(max_steps=6, limit_val_batches=0)
    assert rates_of(fresh, trainer, row_data()) == first
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    loaded = PretrainModule.load_from_checkpoint(
        tmp_path / "first.ckpt",
        model=config,
        optimizer=AdamW(lr=1.0),
        schedule=Linear(horizon_tokens=80),
        weights_only=True,
    )
    assert int(loaded.tokens_seen) == int(fresh.tokens_seen) > 0
    assert rates_of(loaded, make_trainer(max_steps=6, limit_val_batches=0), row_data()) == first


def test_a_model_that_was_built_in_other_processes_gets_its_weights(row_data, make_trainer):
    """Launchers that spawn give back a state dictionary, loaded with ``strict=False``, and no model."""
    config = TransformerConfig(d_model=16, num_layers=1, context_length=16)
    there, here = PretrainModule(TransformerConfig(vocab_size=31, **_sizes(config))), PretrainModule(config)
    there.configure_model()
    here.load_state_dict(there.state_dict(), strict=False)
    for name, weight in there.state_dict().items():
        assert torch.equal(here.state_dict()[name], weight)
    (found,), (wanted,) = (make_trainer().validate(module, row_data(), verbose=False) for module in (here, there))
    assert found == wanted


def _sizes(config):
    return {"d_model": config.d_model, "num_layers": config.num_layers, "context_length": config.context_length}
