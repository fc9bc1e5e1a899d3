"""Checkpoints of split and sharded runs go on anywhere: other ranks, other layouts, one process, a plain Trainer."""

import functools
import pathlib
from enum import Enum

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from split_runs import Losses, Rows, model_config, run, trainer_for
from torch import distributed

from lightning_lm.cli import main
from lightning_lm.errors import CheckpointError
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import Constant, Muon
from lightning_lm.strategies import AtomicCheckpointIO, TensorParallelStrategy

CONFIG = model_config(97, tie_embeddings=True)
TP2, FSDP2 = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 1}
SP2, FILE = {**TP2, "sequence_parallel": True}, {"save_distributed_checkpoint": False}
WRITERS = {
    "tp2 folder": (2, SP2),
    "tp2 file": (2, {**TP2, **FILE}),
    "fsdp2 folder": (2, FSDP2),
    "fsdp2 file": (2, {**FSDP2, **FILE}),
    "2 x 2 folder": (4, SP2),
    "2 x 2 file": (4, {**SP2, **FILE}),
    "one rank folder": (1, FSDP2),
    "plain": (0, None),
}
READERS = {"tp2": (2, SP2), "fsdp2": (2, FSDP2), "2 x 2": (4, TP2), "one rank": (1, FSDP2), "plain": (0, None)}


def part_of_a_run(settings, **options):
    strategy = "auto" if settings is None else TensorParallelStrategy(**settings)
    return run(strategy, config=CONFIG, optimizer=Muon(lr=0.01), gradient_clip_val=0.5, **options)


def on(ranks, size, settings, **options):
    return ranks(size).run(part_of_a_run, settings, **options)[0] if size else part_of_a_run(settings, **options)


@functools.cache
def uninterrupted():
    return part_of_a_run(None, steps=4)


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")

    @functools.cache
    def write(writer):
        path = folder / f"{writer}.ckpt"
        size, settings = WRITERS[writer]
        losses, *_ = on(ranks, size, settings, steps=4, max_steps=2, save_to=path)
        torch.testing.assert_close(losses, uninterrupted()[0][:2], rtol=0, atol=1e-9)
        assert path.is_dir() == ("folder" in writer)
        return path

    return write


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_run_goes_on_anywhere(ranks, written, writer, reader):
    size, settings = READERS[reader]
    path, options = written(writer), {}
    if reader == "plain":
        options["plugins"] = [AtomicCheckpointIO()]  # which reads folders too
    losses, _, weights = on(ranks, size, settings, steps=4, max_steps=4, ckpt_path=path, **options)
    torch.testing.assert_close(losses, uninterrupted()[0][2:], rtol=0, atol=1e-9)
    for name, weight in uninterrupted()[2].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("writer", ["tp2 folder", "2 x 2 folder"])
def test_consolidate_writes_what_one_process_would_have_written(written, tmp_path, writer, capsys):
    target = tmp_path / "whole.ckpt"
    assert main(["consolidate", str(written(writer)), "--output", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    found, plain = (torch.load(path, weights_only=True) for path in (target, written("plain")))
    assert found.keys() == plain.keys()
    for name, weight in plain["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], weight, rtol=0, atol=1e-8)
    (ours,), (theirs,) = found["optimizer_states"], plain["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=1e-8)
    module = PretrainModule.load_from_checkpoint(target, model=CONFIG)
    assert torch.equal(module.state_dict()["model.embed.weight"], found["state_dict"]["model.embed.weight"].float())


def test_consolidate_says_what_it_needs(tmp_path, capsys):
    assert main(["consolidate", str(tmp_path)]) == 1
    assert "no checkpoint of a sharded run" in capsys.readouterr().err


def keep_the_best(folder):
    module = PretrainModule(CONFIG, schedule=Constant())
    keeps = ModelCheckpoint(folder, monitor="train/loss", save_top_k=2, every_n_train_steps=1, save_last="link")
    trainer = trainer_for(
        TensorParallelStrategy(2), callbacks=[keeps, Losses()], enable_checkpointing=True, max_steps=4
    )
    trainer.fit(module, Rows(trainer, 4, 97))
    distributed.barrier()
    best = keeps.best_model_path
    (found,) = trainer.validate(module, Rows(trainer, 1, 97), ckpt_path="best", verbose=False)
    return sorted(path.name for path in pathlib.Path(folder).iterdir()), pathlib.Path(best).name, found


def test_the_best_are_kept_and_found_again(ranks, tmp_path):
    names, best, found = ranks(2).run(keep_the_best, tmp_path)[0]
    assert len(names) == 3
    assert "last.ckpt" in names
    assert best in names
    assert found["val/loss"] > 0


class Colour(Enum):
    RED = "red"


class Settled(PretrainModule):
    def __init__(self, model, folder, colour):
        super().__init__(model, schedule=Constant())
        self.save_hyperparameters("folder", "colour")


def save_hyper_parameters(folder, what):
    module = Settled(CONFIG, pathlib.Path("somewhere"), what)
    trainer = trainer_for(TensorParallelStrategy(2), max_steps=1)
    trainer.fit(module, Rows(trainer, 1, 97))
    trainer.save_checkpoint(folder)
    return AtomicCheckpointIO().load_checkpoint(folder)["hyper_parameters"]


def test_paths_and_enumerations_among_hyper_parameters(ranks, tmp_path):
    for found in ranks(2).run(save_hyper_parameters, tmp_path / "a", Colour.RED):
        assert found == {"folder": "somewhere", "colour": "red"}


def refuse_to_save(folder):
    with pytest.raises(CheckpointError, match=r"could not be read again.*hyper-parameters"):
        save_hyper_parameters(folder, Losses())
    return list(folder.parent.iterdir())


def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(ranks, tmp_path):
    assert ranks(2).run(refuse_to_save, tmp_path / "a") == [[], []]


def test_another_model_is_refused_by_name_and_shape(ranks, written):
    for message in ranks(2).run(resume_another_model, written("tp2 folder")):
        assert "d_model" in message or "num_layers" in message


def resume_another_model(path):
    with pytest.raises(CheckpointError) as caught:
        run(TensorParallelStrategy(2), config=model_config(97, d_model=32, tie_embeddings=True), ckpt_path=path)
    return str(caught.value)
