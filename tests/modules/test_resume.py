"""Runs that stop and go on: bit for bit, with another schedule, and never with someone else's file."""

import dataclasses
import json
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from lightning_lm.errors import CheckpointError
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule, load_model, read_checkpoint
from lightning_lm.optim import WSD, AdamW, Constant, Linear, Muon, Spike
from lightning_lm.strategies import AtomicCheckpointIO


class Losses(Logger):
    name, version = "losses", 0

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if "train/loss" in metrics:
            self.seen[step] = metrics["train/loss"]


def module_for(config, **settings) -> PretrainModule:
    torch.manual_seed(5)
    return PretrainModule(
        dataclasses.replace(config, dropout=0.2), **{"optimizer": Muon(), "schedule": WSD(warmup=2), **settings}
    )


def same_weights(first, second) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture
def run(config, row_data, make_trainer, tmp_path):
    """Train for some steps, with a checkpoint at every one, from the start or from a checkpoint."""

    def go(steps: int, folder: str, *, module=None, resume: Path | None = None, **settings):
        logger, module = Losses(), module or module_for(config)
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(
            **{
                "max_steps": steps,
                "accumulate_grad_batches": 2,
                "gradient_clip_val": 0.5,
                "log_every_n_steps": 2,
                "logger": logger,
                "callbacks": [saver],
                "enable_checkpointing": True,
                "limit_val_batches": 2,
                "val_check_interval": 4,
                **settings,
            }
        )
        trainer.fit(module, datamodule=row_data(), ckpt_path=resume)
        return module, logger.seen

    return go


@pytest.mark.parametrize("plugins", [[], [AtomicCheckpointIO()]], ids=["stock", "atomic"])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumes_bit_for_bit(run, tmp_path, stop, plugins):
    """Dropout, Muon's momentum, the schedule, the logged means and the counters all go on."""
    whole, expected = run(8, "whole")
    resumed, found = run(8, "rest", resume=tmp_path / "whole" / f"step={stop}.ckpt", plugins=plugins)
    assert same_weights(whole, resumed)
    assert found == {step: loss for step, loss in expected.items() if step > stop}
    assert int(whole.tokens_seen) == int(resumed.tokens_seen)


def test_resumes_bit_for_bit_after_a_kill(run, config, tmp_path):
    """The process ends itself with SIGKILL in the middle of a window, with no chance to clean up."""

    class Die(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 9:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        saver = ModelCheckpoint(
            tmp_path / "killed", filename="last", every_n_train_steps=1, enable_version_counter=False
        )
        run(8, "unused", callbacks=[saver, Die()], plugins=[AtomicCheckpointIO()])
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    whole, expected = run(8, "whole")
    resumed, found = run(8, "rest", resume=tmp_path / "killed" / "last.ckpt")
    assert same_weights(whole, resumed)
    assert found == {step: loss for step, loss in expected.items() if step > 4}


def test_another_schedule_takes_effect(run, config, tmp_path):
    """A stable run is cooled down by resuming it with a shorter horizon, and nothing else is changed."""
    run(4, "stable", module=module_for(config, optimizer=AdamW(lr=1.0), schedule=Constant()))
    cooling = module_for(config, optimizer=AdamW(lr=1.0, weight_decay=0.3), schedule=WSD(decay=4))
    seen = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen[trainer.global_step] = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]

    run(8, "cooling", module=cooling, resume=tmp_path / "stable" / "step=4.ckpt", callbacks=[Watch()])
    expected = {4: 1.0, 5: 0.75, 6: 0.5, 7: 0.25}
    assert {step: groups[0][0] for step, groups in seen.items()} == pytest.approx(expected)
    assert {groups[0][1] for groups in seen.values()} == {0.3}


def test_nothing_of_the_horizon_is_in_the_checkpoint(run, config, tmp_path):
    module = module_for(config, schedule=Linear())
    run(2, "short", module=module)
    checkpoint = torch.load(tmp_path / "short" / "step=2.ckpt", weights_only=True)
    assert checkpoint["lr_schedulers"] == [{"last_epoch": 2}]
    entry = {key: value for key, value in checkpoint["lightning_lm"].items() if key != "tokenizer"}
    assert not {"schedule", "horizon", "max_steps"} & set(json.dumps(entry).replace('"', " ").split())
    assert "hyper_parameters" not in checkpoint


def test_the_rule_for_skipping_goes_on(run, config, tmp_path):
    whole, _ = run(6, "whole", module=module_for(config, skip=Spike(warmup=2)))
    middle = tmp_path / "whole" / "step=3.ckpt"
    resumed, _ = run(6, "rest", module=module_for(config, skip=Spike(warmup=2)), resume=middle)
    assert whole._history == resumed._history
    assert whole._history.count == 6


# --- files that do not fit ---


def test_a_checkpoint_of_another_config_says_what_differs(run, config, tmp_path):
    run(1, "run")
    other = dataclasses.replace(config, num_layers=3, layers=Layer(mixer=Attention(num_heads=4)))
    with pytest.raises(CheckpointError) as error:
        run(2, "other", module=module_for(other), resume=tmp_path / "run" / "step=1.ckpt")
    assert "num_layers: 2 in the checkpoint, 3 here" in str(error.value)
    assert "layers.mixer.num_heads: 2 in the checkpoint, 4 here" in str(error.value)
    assert "d_model" not in str(error.value)


def test_another_module_than_a_config_is_compared_by_its_weights(run, config, tmp_path):
    run(1, "run")
    net = torch.nn.Sequential(torch.nn.Embedding(31, 8), torch.nn.Linear(8, 31))
    with pytest.raises(CheckpointError, match=r"model\.0\.weight is missing"):
        run(2, "other", module=PretrainModule(net), resume=tmp_path / "run" / "step=1.ckpt")


def test_a_checkpoint_of_another_optimizer_is_refused(run, config, tmp_path):
    run(1, "run")
    with pytest.raises(CheckpointError, match="MuonOptimizer"):
        run(2, "other", module=module_for(config, optimizer=AdamW()), resume=tmp_path / "run" / "step=1.ckpt")


def test_a_checkpoint_of_another_package_is_refused(run, tmp_path):
    run(1, "run")
    path = tmp_path / "run" / "step=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["lightning_lm"]
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="not written by a module of lightning-lm"):
        run(2, "other", resume=path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_stock_trainer_does_not_unpickle_foreign_objects(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(1, "run")
    path = tmp_path / "run" / "step=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "extra": Evil()}, path)
    with pytest.raises(pickle.UnpicklingError):
        run(2, "stock", resume=path)
    with pytest.raises(CheckpointError, match="not loaded"):
        run(2, "atomic", resume=path, plugins=[AtomicCheckpointIO()])
    with pytest.raises(CheckpointError, match="not loaded"):
        load_model(path)
    assert not (tmp_path / "executed").exists()


# --- the model alone ---


def test_load_model_gives_the_trained_model(run, tmp_path):
    module, _ = run(2, "run")
    model, tokenizer = load_model(tmp_path / "run" / "step=2.ckpt")
    assert tokenizer is None
    assert not model.training
    assert model.config == module.model.config
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), module.model.eval()(ids))


def test_load_from_checkpoint_needs_no_trainer(run, config, tmp_path):
    module, _ = run(3, "run")
    config = dataclasses.replace(config, dropout=0.2)
    again = PretrainModule.load_from_checkpoint(tmp_path / "run" / "step=3.ckpt", model=config, weights_only=True)
    assert same_weights(again, module)
    assert int(again.tokens_seen) == int(module.tokens_seen)


@pytest.mark.parametrize("tied", [False, True])
def test_load_model_keeps_the_precision_and_the_tie(config, row_data, make_trainer, tmp_path, tied):
    module = PretrainModule(dataclasses.replace(config, tie_embeddings=tied))
    trainer = make_trainer(max_steps=1, precision="bf16-true", limit_val_batches=0)
    trainer.fit(module, datamodule=row_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    model, _ = load_model(tmp_path / "half.ckpt")
    assert model.head.weight.dtype == torch.bfloat16
    assert (model.head.weight is model.embed.weight) == tied


def test_load_model_fills_in_the_vocabulary(config, row_data, make_trainer, tmp_path):
    class Words:
        vocab_size = 40

    data = row_data()
    data.tokenizer = Words()
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(PretrainModule(dataclasses.replace(config, vocab_size=None)), datamodule=data)
    trainer.save_checkpoint(tmp_path / "filled.ckpt")
    assert load_model(tmp_path / "filled.ckpt")[0].config.vocab_size == 40
    unfilled = dataclasses.replace(config, vocab_size=None)
    again = PretrainModule.load_from_checkpoint(tmp_path / "filled.ckpt", model=unfilled, weights_only=True)
    assert same_weights(again, trainer.lightning_module)
    other = dataclasses.replace(unfilled, d_model=32)
    with pytest.raises(CheckpointError, match="d_model: 16 in the checkpoint, 32 here"):
        PretrainModule.load_from_checkpoint(tmp_path / "filled.ckpt", model=other, weights_only=True)


def test_load_model_refuses_what_it_cannot_build(row_data, make_trainer, tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Embedding(31, 8), torch.nn.Linear(8, 31))

        def forward(self, input_ids):
            return self.net(input_ids)

    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(PretrainModule(Net()), datamodule=row_data())
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    with pytest.raises(CheckpointError, match="does not describe its model"):
        load_model(tmp_path / "net.ckpt")


NO_CHECKPOINTS = [
    b"",
    b"not a checkpoint",
    b"hello world " * 9,
    b'{"a": 1}',
    b"PK\x03\x04truncated",
    b"\x80\x02h\x05.",
    b"P",
]
NO_CHECKPOINTS += [
    b"\x80\x02" + bytes(range(97, 123)),
    bytes(range(256)),
    b"\x80\x02R.",
    b"\x80\x04\x95\x10.",
    b"\x80\x02Iabc\n.",
]


@pytest.mark.parametrize("content", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "broken.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.ckpt"):
        read_checkpoint(path)


def test_a_checkpoint_that_was_cut_anywhere(tmp_path):
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {f"w{k}": torch.zeros(50, 100) for k in range(10)}}, whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut.ckpt"
    for length in (*range(0, len(content), len(content) // 100), *range(len(content) - 30, len(content))):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
            read_checkpoint(cut)
    assert len(read_checkpoint(whole)["state_dict"]) == 10
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.ckpt")


def test_a_file_of_something_else(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="state_dict"):
        load_model(tmp_path / "other.ckpt")


def test_a_part_that_is_not_known_is_named(run, tmp_path):
    run(1, "run")
    path = tmp_path / "run" / "step=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_lm"]["model"]["part"] = "MyOwnConfig"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="MyOwnConfig"):
        load_model(path)


def test_descriptions_are_plain_data(config):
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
