"""A sharded checkpoint is an ordinary one: any number of ranks, and a plain Trainer, go on from it."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from optimizer_runs import OPTIMIZERS, SPLIT, Run, TinyModule, Windows, make_trainer, weights_of

from lightning_lm.strategies import AtomicCheckpointIO, ShardedOptimizerStrategy

WINDOWS, HALF = 8, 4
RUNS = [*((name, size) for name in ("zero1", "zero2", "ddp") for size in (1, 2, 4)), ("plain", 1)]
READ = [("plain", 1), ("zero1", 4), ("zero2", 2)]
"""Runs whose files every strategy reads; the files of the others hold the same."""


class Rest(Windows):
    """What is left of an epoch; Lightning begins its loaders anew and counts from where it was."""

    def __len__(self):
        return WINDOWS


def strategy_of(name):
    if name.startswith("zero"):
        return ShardedOptimizerStrategy(stage=int(name[4]), min_split_elements=SPLIT)
    return DDPStrategy() if name == "ddp" else "auto"


def first_half(run, name, path):
    module = TinyModule(run)
    callback = ModelCheckpoint(path.parent, path.stem, every_n_train_steps=HALF)
    settings = {"enable_checkpointing": True, "callbacks": [callback], "plugins": [AtomicCheckpointIO()]}
    make_trainer(strategy_of(name), max_steps=HALF, **settings).fit(module, Windows(run))


def second_half(run, name, paths):
    """Go on from each file, and return the losses and the weights of each run."""
    results = {}
    for writer, path in paths.items():
        module = TinyModule(run)
        trainer = make_trainer(strategy_of(name), max_steps=WINDOWS, plugins=[AtomicCheckpointIO()])
        trainer.fit(module, Rest(run, start=HALF), ckpt_path=path)
        results[writer] = module.losses, weights_of(module.model)
    return results


def whole(run):
    module = TinyModule(run)
    make_trainer(max_steps=WINDOWS).fit(module, Windows(run))
    return module.losses, weights_of(module.model)


@pytest.mark.parametrize("optimizer", ["fused", "muon", "whole"])
def test_every_strategy_goes_on_from_every_other(ranks, tmp_path, optimizer):
    run = Run(optimizer, windows=WINDOWS, double=optimizer == "muon")
    losses, weights = ranks(1).run(whole, run)[0]
    paths = {(name, size): tmp_path / f"{name}-{size}.ckpt" for name, size in RUNS}
    for (name, size), path in paths.items():
        ranks(size).run(first_half, run, name, path)
    files = {writer: torch.load(path, weights_only=True) for writer, path in paths.items()}
    for found in files.values():
        assert_same_run(found, files["plain", 1], rtol=1e-5, atol=1e-6)
    for name, size in RUNS:
        for results in ranks(size).run(second_half, run, name, {writer: paths[writer] for writer in READ}):
            assert len(losses) == WINDOWS
            assert [*results] == READ
            for found, ended in results.values():
                assert found == pytest.approx(losses[HALF:], rel=1e-6)
                for key, value in weights.items():
                    torch.testing.assert_close(ended[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_file_holds_what_one_process_would_have_written(ranks, tmp_path, optimizer):
    run = Run(optimizer, windows=WINDOWS, double=True)
    for (name, size), path in {("plain", 1): tmp_path / "plain.ckpt", ("zero1", 2): tmp_path / "zero.ckpt"}.items():
        ranks(size).run(first_half, run, name, path)
    wanted, found = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("plain", "zero"))
    assert_same_run(found, wanted, rtol=1e-9, atol=1e-12)


def assert_same_run(found, wanted, **tolerance):
    """Compare the content of two checkpoints: entries, weights, groups and state of the optimizer."""
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found["state_dict"], wanted["state_dict"], **tolerance)
    (ours,), (theirs,) = found["optimizer_states"], wanted["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], **tolerance)


def checkpointed(stage, folder):
    class Scored(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("score", float(batch_idx in (1, 5)), sync_dist=True)  # the best are known beforehand
            return loss

    run = Run("adamw", windows=WINDOWS)
    best = ModelCheckpoint(
        folder, "{step}", monitor="score", mode="max", save_top_k=2, save_last=True, every_n_train_steps=1
    )
    trainer = make_trainer(
        strategy_of(f"zero{stage}"), enable_checkpointing=True, callbacks=[best], plugins=[AtomicCheckpointIO()]
    )
    trainer.fit(Scored(run), Windows(run))
    return best.best_model_path


@pytest.mark.parametrize("stage", [1, 2])
def test_model_checkpoint_keeps_the_best_and_the_last(ranks, tmp_path, stage):
    paths = ranks(2).run(checkpointed, stage, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=2.ckpt", "step=6.ckpt"]
    assert set(paths) == {str(tmp_path / "step=2.ckpt")} or set(paths) == {str(tmp_path / "step=6.ckpt")}
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.iterdir()}
    assert steps == {"last.ckpt": WINDOWS, "step=2.ckpt": 2, "step=6.ckpt": 6}
