"""Strategies by name, from Python and from configurations, with settings of Lightning's strategy below them."""

import subprocess
import sys
from datetime import timedelta

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy

from lightning_lm import strategies
from lightning_lm.errors import ConfigurationError
from lightning_lm.strategies import DataParallelStrategy, ShardedOptimizerStrategy
from lightning_lm.strategies.ddp_settings import without_defaults

CLASSES = [name for name in strategies.__all__ if name.endswith("Strategy")]


def strategy_of(*words):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    config = parser.parse_args(["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.devices=2", *words])
    return Trainer(**vars(parser.instantiate(config).trainer)).strategy


@pytest.mark.parametrize("name", [*CLASSES, "DDPStrategy", "ModelParallelStrategy"])
def test_a_class_name_is_enough(name):
    assert type(Trainer(strategy=name, accelerator="cpu", devices=2, logger=False).strategy).__name__ == name


@pytest.mark.parametrize("name", CLASSES)
def test_a_configuration_may_name_a_class_alone_or_with_a_timeout(name):
    words = ["--trainer.strategy", name]
    assert type(strategy_of(*words)).__name__ == name
    found = strategy_of(*words, "--trainer.strategy.timeout", "0:00:20")
    assert type(found).__name__ == name
    assert found._timeout == timedelta(seconds=20)


@pytest.mark.parametrize("stage", [1, 2])
def test_settings_of_the_class_below_arrive(stage):
    words = ["--trainer.strategy", "ShardedOptimizerStrategy", "--trainer.strategy.stage", str(stage)]
    words += ["--trainer.strategy.timeout", "0:01:00", "--trainer.strategy.start_method", "spawn"]
    found = strategy_of(*words)
    assert (found.stage, found._timeout, found._start_method) == (stage, timedelta(minutes=1), "spawn")
    if stage == 1:
        assert strategy_of(*words, "--trainer.strategy.bucket_cap_mb", "5")._ddp_kwargs["bucket_cap_mb"] == 5
        assert found._ddp_kwargs["gradient_as_bucket_view"]
    else:
        with pytest.raises(Exception, match=r"stage=2\) cannot work with bucket_cap_mb; leave it out"):
            strategy_of(*words, "--trainer.strategy.bucket_cap_mb", "5")


def test_only_what_was_asked_for_is_refused():
    assert without_defaults({"timeout": timedelta(seconds=1), "static_graph": False, "ddp_comm_hook": None}) == {
        "timeout": timedelta(seconds=1)
    }
    with pytest.raises(ConfigurationError, match="has no static_graph; leave"):
        DataParallelStrategy(static_graph=True, check_reduction=False)
    assert not ShardedOptimizerStrategy(gradient_as_bucket_view=False)._ddp_kwargs["gradient_as_bucket_view"]
    assert DDPStrategy(**without_defaults({"check_reduction": False}))._ddp_kwargs == {}


def test_names_are_known_once_any_part_is_imported(tmp_path):
    code = """
import importlib, os, sys
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

assert "zero2" not in StrategyRegistry
for package in ("modules", "datamodules", "callbacks"):
    if os.fork() == 0:  # as if the package were the first that is imported
        importlib.import_module(f"lightning_lm.{package}")
        print(package, "zero2" in StrategyRegistry, "lightning_lm.strategies" in sys.modules, end=" ")
        options = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_progress_bar": False}
        print(Trainer(strategy="zero2", **options).strategy.stage, flush=True)
        os._exit(0)
    os.wait()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"{name} True False 2" for name in ("modules", "datamodules", "callbacks")]
