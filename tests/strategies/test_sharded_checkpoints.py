"""Checkpoints of split and sharded runs go on anywhere: other ranks, other layouts, one process, a plain Trainer."""

import functools
import pathlib
from enum import Enum

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from split_runs import Losses, Rows, model_config, run, trainer_for
from torch import distributed

from lightning_lm.cli import main
from lightning_lm.errors import CheckpointError
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import Constant, Muon
from lightning_lm.strategies import AtomicCheckpointIO, ShardedOptimizerStrategy, TensorParallelStrategy

SPLIT = 600
"""Size from which optimizer state is split by rows: the embedding."""

CONFIG = model_config(97, tie_embeddings=True, num_layers=1, attention={"num_kv_heads": 4})
STRATEGIES = {
    "plain": lambda: "auto",
    "ddp": DDPStrategy,
    "zero1": functools.partial(ShardedOptimizerStrategy, stage=1, min_split_elements=SPLIT),
    "zero2": functools.partial(ShardedOptimizerStrategy, stage=2, min_split_elements=SPLIT),
    "fsdp2": functools.partial(TensorParallelStrategy, 1),
    "fsdp2 file": functools.partial(TensorParallelStrategy, 1, save_distributed_checkpoint=False),
    "tp": functools.partial(TensorParallelStrategy, "auto"),
    "tp file": functools.partial(TensorParallelStrategy, "auto", save_distributed_checkpoint=False),
    "dp x tp": functools.partial(TensorParallelStrategy, 2, sequence_parallel=True),
    "dp x tp file": functools.partial(TensorParallelStrategy, 2, save_distributed_checkpoint=False),
}
ANY_SIZE = [(name, size) for name in ("ddp", "zero1", "zero2", "fsdp2") for size in (1, 2, 4)]
READERS = [("plain", 1), *ANY_SIZE, ("tp", 2), ("tp", 4), ("dp x tp", 4)]
WRITERS = [*READERS, ("fsdp2 file", 2), ("tp file", 2), ("dp x tp file", 4)]
READ = [("plain", 1), ("zero1", 2), ("fsdp2", 2), ("fsdp2", 4), ("tp", 2), ("dp x tp", 4), ("dp x tp file", 4)]
"""Runs whose files and folders every strategy reads, one for each layout; those of the others hold the same."""
STEPS, HALF = 4, 2


def part_of_a_run(name, paths=(None,), **options):
    """Train from each file on, with one strategy."""
    options = {"config": CONFIG, "optimizer": Muon(lr=0.01), "gradient_clip_val": 0.5, "steps": STEPS, **options}
    plugins = [AtomicCheckpointIO()]  # which reads folders too
    return [run(STRATEGIES[name](), ckpt_path=path, plugins=[*plugins], **options) for path in paths]


@pytest.fixture(scope="module")
def uninterrupted(ranks):
    return ranks(1).run(part_of_a_run, "plain")[0][0]


@pytest.fixture(scope="module")
def written(ranks, uninterrupted, tmp_path_factory):
    """Return where each strategy has left half of a run."""
    folder, paths = tmp_path_factory.mktemp("written"), {}
    for name, size in WRITERS:
        paths[name, size] = path = folder / f"{name} {size}.ckpt"
        for ((losses, *_),) in ranks(size).run(part_of_a_run, name, max_steps=HALF, save_to=path):
            torch.testing.assert_close(losses, uninterrupted[0][:HALF], rtol=0, atol=1e-9)
        assert path.is_dir() == (name in ("fsdp2", "tp", "dp x tp"))
    return paths


@pytest.mark.parametrize(("name", "size"), READERS)
def test_a_run_goes_on_from_any_other(ranks, written, uninterrupted, name, size):
    losses, _, weights = uninterrupted
    for results in ranks(size).run(part_of_a_run, name, [written[writer] for writer in READ], max_steps=STEPS):
        assert len(results) == len(READ)
        for found, _, ended in results:
            torch.testing.assert_close(found, losses[HALF:], rtol=0, atol=1e-9)
            assert ended.keys() == weights.keys()
            for key, weight in weights.items():
                torch.testing.assert_close(ended[key], weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: " ".join(map(str, writer)))
def test_every_strategy_writes_what_one_process_would_have_written(written, tmp_path, writer, capsys):
    target = written[writer]
    if target.is_dir():
        target = tmp_path / "whole.ckpt"
        assert main(["consolidate", str(written[writer]), "--output", str(target)]) == 0
        assert str(target) in capsys.readouterr().out
    found, plain = (torch.load(path, weights_only=True) for path in (target, written["plain", 1]))
    assert found.keys() == plain.keys()
    for name, weight in plain["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], weight, rtol=0, atol=1e-8)
    (ours,), (theirs,) = found["optimizer_states"], plain["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=1e-8)


def test_a_consolidated_file_is_read_as_any_other(written, tmp_path):
    target = tmp_path / "whole.ckpt"
    assert main(["consolidate", str(written["dp x tp", 4]), "--output", str(target)]) == 0
    module = PretrainModule.load_from_checkpoint(target, model=CONFIG)
    weights = torch.load(target, weights_only=True)["state_dict"]
    assert torch.equal(module.state_dict()["model.embed.weight"], weights["model.embed.weight"].float())


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
    for message in ranks(2).run(resume_another_model, written["tp", 2]):
        assert "d_model" in message or "num_layers" in message


def resume_another_model(path):
    with pytest.raises(CheckpointError) as caught:
        run(TensorParallelStrategy(2), config=model_config(97, d_model=32, tie_embeddings=True), ckpt_path=path)
    return str(caught.value)
