"""`PretrainModule` in a stock Trainer: what it logs, measures, skips and refuses."""

import dataclasses
import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy

from lightning_lm.errors import ConfigurationError
from lightning_lm.modules import CrossEntropy, PretrainModule
from lightning_lm.optim import SGD, WSD, AdamW, Constant, Cosine, InverseSquareRoot, Linear, Muon, NonFinite, Spike
from lightning_lm.types import IGNORE_INDEX


class Memory(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    name, version = "memory", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, dict(metrics)))

    def of(self, name):
        return {step: metrics[name] for step, metrics in self.seen if name in metrics}


def nll(module, rows) -> tuple[float, int]:
    """Float64, with torch's own cross-entropy."""
    model, targets = module.model.double(), rows["labels"][:, 1:].flatten()
    with torch.no_grad():
        logits = model(rows["input_ids"][:, :-1]).flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    model.float()
    return total, (targets != IGNORE_INDEX).sum().item()


def test_train_loss_is_the_mean_over_the_tokens_since_the_last_time(config, row_data, make_trainer):
    logger, data = Memory(), row_data()
    trainer = make_trainer(max_steps=6, accumulate_grad_batches=2, log_every_n_steps=3, logger=logger)
    module = PretrainModule(config, optimizer=SGD(lr=0.0), schedule=Constant())
    trainer.fit(module, datamodule=data)
    first, second = (
        {name: value[part] for name, value in data.train_rows.items()} for part in (slice(24), slice(24, 48))
    )
    (nll_1, tokens_1), (nll_2, tokens_2) = nll(module, first), nll(module, second)
    assert logger.of("train/loss") == pytest.approx({3: nll_1 / tokens_1, 6: nll_2 / tokens_2}, rel=1e-6)
    assert logger.of("train/tokens") == {3: tokens_1, 6: tokens_1 + tokens_2}
    assert int(module.tokens_seen) == tokens_1 + tokens_2
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(nll_2 / tokens_2)
    assert module.last_metrics["train/loss"] == logger.of("train/loss")[6]


def test_learning_rate_and_gradient_norm_are_those_of_the_step(config, row_data, make_trainer):
    logger = Memory()
    trainer = make_trainer(max_steps=4, log_every_n_steps=1, logger=logger, gradient_clip_val=0.1)
    norms = []

    class Watch(PretrainModule):
        def configure_gradient_clipping(self, *args, **kwargs):
            grads = [param.grad for param in self.model.parameters()]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            super().configure_gradient_clipping(*args, **kwargs)
            assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.1, rel=1e-4)

    trainer.fit(Watch(config, optimizer=AdamW(lr=1.0), schedule=Linear()), datamodule=row_data())
    assert logger.of("train/lr") == pytest.approx({1: 1.0, 2: 0.75, 3: 0.5, 4: 0.25})
    assert list(logger.of("train/grad_norm").values()) == pytest.approx(norms)


def test_clipping_by_value_is_lightnings(config, row_data, make_trainer):
    seen = []

    class Watch(PretrainModule):
        def configure_gradient_clipping(self, *args, **kwargs):
            super().configure_gradient_clipping(*args, **kwargs)
            seen.append(max(param.grad.abs().max().item() for param in self.model.parameters()))

    trainer = make_trainer(max_steps=2, gradient_clip_val=1e-4, gradient_clip_algorithm="value")
    trainer.fit(Watch(config), datamodule=row_data())
    assert seen == pytest.approx([1e-4, 1e-4])


def test_nothing_is_logged_through_the_slow_path_at_every_step(config, row_data, make_trainer):
    class Watch(PretrainModule):
        def log(self, *args, **kwargs):
            assert not self.trainer.training

    make_trainer(max_steps=3, log_every_n_steps=1, limit_val_batches=0).fit(Watch(config), datamodule=row_data())


def test_validation_loss_is_exact_on_one_process(config, row_data, make_trainer):
    data, trainer = row_data(), make_trainer()
    module = PretrainModule(config)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    total, count = nll(module, data.validation_rows)
    assert found["val/loss"] == pytest.approx(total / count, rel=1e-6)
    assert module.last_metrics["val/loss"] == pytest.approx(total / count, rel=1e-6)


def test_validation_loss_is_exact_on_two_uneven_ranks(config, row_data, make_trainer, tmp_path):
    """Ten rows in batches of three a rank: the last batch of one rank holds three rows, that of the other one."""

    class Keep(PretrainModule):
        def on_validation_end(self):
            if self.global_rank == 0:
                torch.save(self.last_metrics["val/loss"], tmp_path / "loss.pt")

    data = row_data()
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    torch.manual_seed(0)
    make_trainer(devices=2, strategy=strategy).validate(Keep(config), datamodule=data, verbose=False)
    torch.manual_seed(0)
    reference = PretrainModule(config)
    reference.configure_model()
    total, count = nll(reference, data.validation_rows)
    assert torch.load(tmp_path / "loss.pt", weights_only=True) == pytest.approx(total / count, rel=1e-6)


def test_validation_hands_its_sums_to_callbacks(config, rows):
    module = PretrainModule(config)
    module.configure_model()
    batch = rows(6)
    sums = module.evaluate_batch(batch)
    total, count = nll(module, batch)
    assert sums["nll_sum"].item() == pytest.approx(total, rel=1e-6)
    assert sums["num_tokens"].item() == count
    assert torch.equal(sums["target_ids"], batch["labels"][:, 1:])
    assert not sums["nll_sum"].requires_grad


def test_an_evaluation_without_targets_logs_nothing(config, row_data, make_trainer):
    data = row_data()
    data.validation_rows["labels"].fill_(IGNORE_INDEX)
    assert make_trainer().validate(PretrainModule(config), datamodule=data, verbose=False) == [{}]


def test_lightnings_callbacks_find_what_they_watch(config, row_data, make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="val/loss", filename="best")
    callbacks = [checkpoint, EarlyStopping("val/loss", patience=100), LearningRateMonitor()]
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(
        max_steps=8,
        val_check_interval=4,
        log_every_n_steps=1,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=True,
    )
    trainer.fit(PretrainModule(config, optimizer=Muon()), datamodule=row_data())
    assert checkpoint.best_model_score == pytest.approx(trainer.callback_metrics["val/loss"], rel=0.5)
    assert (tmp_path / "best" / "best.ckpt").is_file()
    assert {"lr-CombinedOptimizer/muon", "lr-CombinedOptimizer/adamw"} <= set(trainer.callback_metrics)


def test_it_learns(config, row_data, loader, make_trainer):
    """Rows are drawn once, so a model of this size learns them by heart."""
    module = PretrainModule(config, optimizer=Muon(lr=0.05, adamw=AdamW(lr=0.03)), schedule=WSD(warmup=3))
    data = row_data(train=16)
    data.train_dataloader = lambda: loader(data.train_rows, 16)
    trainer = make_trainer(max_steps=60, log_every_n_steps=60, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    assert module.last_metrics["train/loss"] < math.log(31)
    total, count = nll(module, data.train_rows)
    assert total / count < 0.5


# --- the model ---


class Vocabulary:
    vocab_size = 77

    def to_files(self):
        return {}


def test_the_vocabulary_comes_from_the_tokenizer(config, row_data, make_trainer):
    data = row_data()
    data.tokenizer = Vocabulary()
    module = PretrainModule(dataclasses.replace(config, vocab_size=None))
    make_trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=data)
    assert module.model.head.out_features == 77


def test_without_any_vocabulary_it_says_so(config, row_data, make_trainer):
    module = PretrainModule(dataclasses.replace(config, vocab_size=None))
    with pytest.raises(ConfigurationError, match="vocab_size"):
        make_trainer(max_steps=1).fit(module, datamodule=row_data())


def test_configure_model_builds_once(config):
    module = PretrainModule(config)
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model


def test_a_model_that_only_returns_logits(row_data, make_trainer):
    net = torch.nn.Sequential(torch.nn.Embedding(31, 8), torch.nn.Linear(8, 31))

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, input_ids):
            return self.net(input_ids)

    data, trainer = row_data(), make_trainer(max_steps=2)
    module = PretrainModule(Plain(), loss=CrossEntropy(z_loss=1e-4))
    trainer.fit(module, datamodule=data)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    total, count = nll(module, data.validation_rows)
    assert found["val/loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("given", ["config", "module"])
def test_blocks_are_compiled_in_place(config, given):
    module = PretrainModule(config if given == "config" else config.build(), compile="blocks")
    module.configure_model()
    assert [block._compiled_call_impl is not None for block in module.model.layers] == [True, True]
    plain = PretrainModule(config)
    plain.configure_model()
    assert set(module.state_dict()) == set(plain.state_dict())


# --- dropout ---


@pytest.mark.parametrize("draws", [0, 5])
def test_dropout_depends_on_seed_and_step_alone(config, row_data, make_trainer, draws):
    """Random numbers that someone else takes from torch's generator change nothing."""

    class Disturbed(PretrainModule):
        def on_train_batch_start(self, batch, batch_idx):
            torch.rand(draws * batch_idx)

    def run(kind):
        torch.manual_seed(3)
        module = kind(dataclasses.replace(config, dropout=0.3))
        make_trainer(max_steps=3, accumulate_grad_batches=2, limit_val_batches=0).fit(module, datamodule=row_data())
        return module.model.state_dict()

    first, second = run(PretrainModule), run(Disturbed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_differs_between_steps_and_micro_batches(config, rows, loader, make_trainer):
    losses = []

    class Watch(PretrainModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    batch = {name: value.repeat(4, 1) for name, value in rows(16).items()}
    module = Watch(dataclasses.replace(config, dropout=0.5), optimizer=SGD(lr=0.0))
    make_trainer(max_steps=2, accumulate_grad_batches=2).fit(module, loader(batch, 16))
    assert len(set(losses)) == 4


# --- the length of a run ---


def rates(trainer, module, data) -> list[float]:
    found = []
    original = module.on_train_batch_end

    def watch(*args):
        found.append(trainer.optimizers[0].param_groups[0]["lr"])
        original(*args)

    module.on_train_batch_end = watch
    trainer.fit(module, datamodule=data)
    return found


def test_the_horizon_is_the_trainers(config, row_data, make_trainer):
    module = PretrainModule(config, optimizer=AdamW(lr=1.0), schedule=Linear())
    assert rates(make_trainer(max_steps=4, limit_val_batches=0), module, row_data()) == pytest.approx(
        [0.75, 0.5, 0.25, 0]
    )


def test_the_horizon_may_be_epochs(config, row_data, make_trainer):
    module = PretrainModule(config, optimizer=AdamW(lr=1.0), schedule=Linear())
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=3, limit_val_batches=0)
    rates(trainer, module, row_data(train=24))
    assert trainer.lr_scheduler_configs[0].scheduler.horizon == 2


def test_the_horizon_may_be_tokens(config, row_data, make_trainer):
    module = PretrainModule(config, optimizer=AdamW(lr=1.0), schedule=Linear(horizon_tokens=200))
    data = row_data()
    targets = (data.train_rows["labels"] != IGNORE_INDEX).sum(dim=1).view(-1, 4).sum(dim=1).cumsum(dim=0)
    found = rates(make_trainer(max_steps=3, limit_val_batches=0), module, data)
    assert found == pytest.approx([1 - seen / 200 for seen in targets[:3].tolist()])


def test_an_endless_run_needs_a_schedule_without_an_end(config, row_data, make_trainer):
    data = row_data(train=8)
    with pytest.raises(ConfigurationError, match=r"Cosine.*max_steps"):
        make_trainer(max_epochs=-1).fit(PretrainModule(config, schedule=Cosine()), datamodule=data)
    module = PretrainModule(config, schedule=InverseSquareRoot(warmup=2))
    module.on_train_batch_end = lambda *args: setattr(module.trainer, "should_stop", True)
    make_trainer(max_epochs=-1).fit(module, datamodule=data)


# --- steps that are not taken ---


class Poisoned(PretrainModule):
    """One micro-batch has a gradient that is not finite."""

    def __init__(self, *args, value=math.nan, **kwargs):
        super().__init__(*args, **kwargs)
        self.weights, self.value = [], value

    def on_train_batch_start(self, batch, batch_idx):
        self.weights.append(self.model.head.weight.detach().clone())

    def training_loss(self, batch):
        loss = super().training_loss(batch)
        return loss._replace(loss_sum=loss.loss_sum * self.value) if self.trainer.global_step == 2 else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_step_is_skipped_counted_and_reported(config, row_data, make_trainer, value):
    logger = Memory()
    module = Poisoned(config, skip=NonFinite(), value=value)
    trainer = make_trainer(max_steps=5, logger=logger, log_every_n_steps=1, limit_val_batches=0, gradient_clip_val=1.0)
    with pytest.warns(UserWarning, match=r"Step 3 is skipped: gradient norm (nan|inf)"):
        trainer.fit(module, datamodule=row_data())
    moved = [not torch.equal(old, new) for old, new in zip(module.weights, module.weights[1:], strict=False)]
    assert moved == [True, True, False, True]
    assert module.skipped_steps == 1
    assert logger.of("train/skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    assert all(param.isfinite().all() for param in module.parameters())


def test_a_spike_is_skipped(config, row_data, make_trainer):
    module = Poisoned(config, skip=Spike(warmup=2), value=1e6)
    with pytest.warns(UserWarning, match=r"Step 3 is skipped.*is usual"):
        make_trainer(max_steps=4, limit_val_batches=0).fit(module, datamodule=row_data())
    assert module.skipped_steps == 1


# --- refusals ---


def test_a_strategy_that_hides_gradients_is_refused(config, row_data, make_trainer):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Hiding(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(ConfigurationError, match="Hiding"):
        make_trainer(max_steps=1, strategy=Hiding()).fit(PretrainModule(config), datamodule=row_data())
