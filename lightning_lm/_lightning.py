"""The only file that touches a private name of Lightning; a test says which when one is renamed."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lm.parts import Part, kept_values

__all__ = [
    "is_launched_child",
    "log_step",
    "no_signal_handlers",
    "register_strategies",
    "requeues",
    "return_to_step_end",
    "save_last",
    "set_mesh_sizes",
    "trainer_of",
    "warn_of_kept_values",
]

_SHORT_NAMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "zero1": ("ShardedOptimizerStrategy", {"stage": 1}, "DDP, sharded optimizer state"),
    "zero2": ("ShardedOptimizerStrategy", {"stage": 2}, "DDP, sharded optimizer state and gradients"),
    "fsdp2": ("ShardedModelStrategy", {}, "sharded parameters, gradients and optimizer state"),
    "tensor_parallel": ("ShardedModelStrategy", {"tensor_parallel_size": "auto"}, "matrices split over a node"),
}
_OURS = "lightning_lm.strategies"
_CLASSES: dict[str, tuple[str, ...]] = {
    _OURS: ("ContextParallelStrategy", "DataParallelStrategy", "PipelineStrategy", "ShardedOptimizerStrategy"),
    "lightning.pytorch.strategies": ("DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"),
}
_CLASSES[_OURS] += ("ShardedModelStrategy", "TensorParallelStrategy")


def register_strategies() -> None:
    """Add short names and class names of strategies to Lightning's registry, once.

    Lightning has no entry points for strategies, so ``modules``, ``datamodules``, ``callbacks`` and ``strategies`` do
    this when they are imported; a strategy itself is imported when its name is used.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    entries = {name: (_OURS, *entry) for name, entry in _SHORT_NAMES.items()}
    for module, names in _CLASSES.items():  # a Trainer reads names in lower case
        entries |= {name.lower(): (module, name, {}, name) for name in names}
    for name, (module, cls, settings, description) in entries.items():
        if name not in StrategyRegistry:
            factory = functools.partial(_build, module, cls)
            StrategyRegistry.register(name, factory, description=description, **settings)


def _build(module: str, name: str, **settings: Any) -> Any:
    return getattr(importlib.import_module(module), name)(**settings)


def set_mesh_sizes(strategy: Any, *, data_parallel: int, tensor_parallel: int) -> None:
    """Tell a `ModelParallelStrategy` the sizes of its mesh once the number of processes is known.

    Its own "auto" makes as many data-parallel ranks as there are nodes, whatever the other size.

    Args:
        strategy: Not yet set up.
        data_parallel: Ranks that read different data.
        tensor_parallel: Ranks that share each matrix.
    """
    strategy._data_parallel_size = data_parallel
    strategy._tensor_parallel_size = tensor_parallel


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the Trainer that runs a module; ``None`` outside of a run, where ``module.trainer`` raises."""
    return module._trainer


def requeues(trainer: Trainer) -> bool:
    """Return whether Lightning handles SIGTERM and SIGUSR1 itself, to save and requeue a job of SLURM."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


@contextlib.contextmanager
def no_signal_handlers(trainer: Trainer) -> Iterator[None]:
    """Keep a Trainer from handling signals, and its ranks from asking each other about them before every batch.

    Its handler of SIGTERM broadcasts: ranks that are at another collective operation meanwhile hang.

    Args:
        trainer: A Trainer that has not begun its loops.
    """
    replaced: list[tuple[Any, str]] = [
        (trainer._signal_connector, "register_signal_handlers"),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ]
    for owner, name in replaced:
        setattr(owner, name, lambda: None)
    try:
        yield
    finally:
        for owner, name in replaced:
            vars(owner).pop(name, None)


def log_step(trainer: Trainer) -> None:
    """Pass the metrics of a batch on to the loggers, as Lightning does after the last hook of the batch."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def is_launched_child(trainer: Trainer) -> bool:
    """Return whether Lightning's launcher in another process started this one; it ends all if one ends badly."""
    launched = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher) and trainer.local_rank > 0
    return launched and isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)


def save_last(trainer: Trainer, saver: ModelCheckpoint) -> None:
    """Let a callback write its last checkpoint now, unless it has written one of this step. Collective.

    Args:
        trainer: The Trainer of the run.
        saver: A callback with ``save_last``.
    """
    if saver._last_global_step_saved != trainer.global_step:
        saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))


def return_to_step_end(trainer: Trainer) -> None:
    """Count batches as at the end of the newest step, so that a checkpoint of an interrupted loop resumes there.

    A validation that was interrupted is run again by the run that resumes.

    Args:
        trainer: A Trainer whose loops an exception has left.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.validating:
        validation: Any = loop.val_loop.batch_progress
        validation.current.reset()
        validation.total.ready = validation.total.started = validation.total.completed + 1
        validation.total.processed = validation.total.completed
        return
    batches: Any = loop.batch_progress
    current, total = batches.current, batches.total
    for counts in (current, total):
        counts.ready = counts.started = counts.processed
    if 0 < current.processed == current.completed:
        current.completed, total.completed = current.completed - 1, total.completed - 1
        loop._batches_that_stepped -= 1


def warn_of_kept_values(cls: type, key: str) -> None:
    """Warn if LightningCLI makes an object with numbers of a default part in the part that replaced it.

    With ``--model.optimizer Muon`` it keeps the learning rate of the default, AdamW.

    Args:
        cls: Class that is made.
        key: Its key in the configuration.
    """
    given = _given_hyperparameters.get() or {}
    kept: dict[str, tuple[str, object, object]] = {}
    for name, parameter in inspect.signature(cls).parameters.items() if given else ():
        default = parameter.default
        for path, value, own in kept_values(default, given.get(name)) if isinstance(default, Part) else ():
            kept[f"{key}.{name}.{path}"] = (type(default).__name__, value, own)
    if kept:
        listed = ", ".join(f"{path}={value} of {replaced}" for path, (replaced, value, _) in kept.items())
        options = " ".join(f"--{path}={own}" for path, (_, _, own) in kept.items())
        rank_zero_warn(
            f"LightningCLI keeps the values of a class that is replaced: {listed}. The defaults of the new class would "
            f"be {options}; set each of them to the value that you mean."
        )
