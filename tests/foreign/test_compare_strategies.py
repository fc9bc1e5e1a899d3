"""The comparison finds a test that fails under one strategy only."""

import pytest
from foreign import compare_strategies, strategy_plugin
from lightning.pytorch import Trainer

from lightning_lm.strategies import ShardedOptimizerStrategy

SUITE = '''
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import distributed


def fit(path, **settings):
    trainer = Trainer(default_root_dir=path, max_steps=1, limit_val_batches=0, logger=False, **settings)
    trainer.fit(BoringModel())
    return trainer


def test_that_holds(tmp_path):
    trainer = fit(tmp_path, strategy="auto", accelerator="cpu", devices=1)
    assert trainer.world_size == distributed.get_world_size()
    assert (tmp_path / "checkpoints").exists()


def test_of_the_wrapper():
    assert type(Trainer().strategy).__name__ == "DDPStrategy"


def test_that_never_holds():
    assert False


def test_of_one_rank(tmp_path):
    """Only the first rank fails; the other must not wait for it for ever, nor disturb the next test."""
    trainer = fit(tmp_path, enable_checkpointing=False)
    assert not (trainer.global_rank == 0 and trainer.world_size == 2)


def test_that_is_left_alone():
    assert Trainer(strategy="ddp_spawn", accelerator="cpu", devices=3, barebones=True).world_size == 3
'''


def test_outcomes_on_two_ranks(tmp_path):
    folder = tmp_path / "tests_pytorch"
    folder.mkdir()
    (folder / "test_suite.py").write_text(SUITE)
    outcomes = compare_strategies.run(tmp_path, "zero2", 2, ["tests_pytorch"])
    found = {test.rpartition("::")[2]: outcome.partition(":")[0] for test, outcome in outcomes.items()}
    assert found == {
        "test_that_holds": "passed",
        "test_of_the_wrapper": "rank 0, call",
        "test_that_never_holds": "rank 0, call",
        "test_of_one_rank": "rank 0, call",
        "test_that_is_left_alone": "passed",
    }


@pytest.mark.parametrize("settings", [{}, {"strategy": "ddp", "devices": 1}, {"strategy": "ddp_spawn", "devices": "1"}])
def test_ordinary_settings_get_the_strategy(settings):
    trainer = Trainer(**strategy_plugin.replaced(settings, "zero2", 1), barebones=True)
    assert isinstance(trainer.strategy, ShardedOptimizerStrategy)
    assert (trainer.strategy.stage, trainer.world_size) == (2, 1)


@pytest.mark.parametrize("settings", [{"strategy": "fsdp"}, {"accelerator": "gpu"}, {"devices": 3}, {"num_nodes": 2}])
def test_other_settings_are_left_alone(settings):
    assert strategy_plugin.replaced(settings, "zero2", 1) == settings


def test_what_fails_under_one_strategy_only_is_named(tmp_path, monkeypatch, capsys):
    outcomes = {
        "ddp": {"a": "passed", "b": "passed", "c": "skipped", "d": "rank 0, call: x", "e": "passed"},
        "zero1": {"a": "passed", "b": "passed", "c": "rank 0, call: x", "d": "passed", "e": "passed"},
        "zero2": {"a": "passed", "b": "rank 1, setup: y", "c": "rank 0, call: x", "d": "rank 0, call: x"},
    }
    monkeypatch.setattr(compare_strategies, "run", lambda sources, strategy, num_ranks, arguments: outcomes[strategy])
    assert compare_strategies.main([str(tmp_path), "--strategy", "zero1"]) == 0
    assert compare_strategies.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count("only under") == 2
    assert "ddp    3 passed, 1 failed, 1 skipped" in said
    assert "only under zero2: b\n    rank 1, setup: y" in said
    assert "only under zero2: e\n    did not run" in said


def test_nothing_to_compare_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_strategies, "run", lambda *_: {})
    assert compare_strategies.main([str(tmp_path)]) == 1
