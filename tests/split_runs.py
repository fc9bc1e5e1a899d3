"""Short runs on one process or on many, over the same windows, for tests of strategies."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision

from lightning_lm.distributed import data_rank, data_ranks
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import AdamW, Constant
from lightning_lm.strategies import ShardedModelStrategy, ShardedOptimizerStrategy

__all__ = ["STRATEGIES", "Losses", "Rows", "model_config", "run", "save_run", "trainer_for", "weights_of"]

ROWS, LENGTH = 8, 13
"""Rows of an optimizer step, and tokens of a row: 12 positions, which no number of ranks but 2, 3, 4 divides."""

STRATEGIES = {
    "one": lambda: "auto",
    "ddp": lambda: "ddp",
    "zero1": lambda: ShardedOptimizerStrategy(stage=1, min_split_elements=500),
    "zero2": lambda: ShardedOptimizerStrategy(stage=2, min_split_elements=500),
    "fsdp2": lambda: ShardedModelStrategy(1),
    "tp2": lambda: ShardedModelStrategy(2),
    "tp2 sp": lambda: ShardedModelStrategy(2, sequence_parallel=True),
}
"""What a user chooses; small matrices are split too."""


def model_config(vocab_size: int = 96, *, attention: dict[str, Any] | None = None, **fields: Any) -> TransformerConfig:
    """Return a small model with two key heads."""
    mixer = Attention(**{"num_heads": 4, "num_kv_heads": 2, **(attention or {})})
    layers = fields.pop("layers", Layer(mixer=mixer, ffn=GLU(hidden_size=32)))
    return TransformerConfig(
        **{"vocab_size": vocab_size, "d_model": 16, "num_layers": 2, "context_length": 16, "layers": layers, **fields}
    )


class Rows:
    """The same rows of each step, whoever reads them; every rank its own, and other counts of targets in each.

    Args:
        trainer: Knows the ranks.
        steps: Optimizer steps.
        vocab_size: Number of ids.
    """

    def __init__(self, trainer: Trainer, steps: int, vocab_size: int) -> None:
        self.trainer, self.steps, self.vocab_size = trainer, steps, vocab_size

    def __len__(self) -> int:
        return self.steps * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Any:
        parts = data_ranks(self.trainer) * self.trainer.accumulate_grad_batches
        for step in range(self.trainer.global_step, self.trainer.global_step + self.steps):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(self.vocab_size, (ROWS, LENGTH), generator=generator)
            labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
            labels[0, 2:] = -100
            for micro_batch in range(self.trainer.accumulate_grad_batches):
                number = micro_batch * data_ranks(self.trainer) + data_rank(self.trainer)
                yield {"input_ids": ids.chunk(parts)[number], "labels": labels.chunk(parts)[number]}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass  # the step of the Trainer is the position


def save_run(name: str, path: Path) -> None:
    """Train a model of one layer for a step with a strategy of `STRATEGIES`, and save a checkpoint."""
    run(STRATEGIES[name](), config=model_config(num_layers=1), steps=1, save_to=path)


class Losses(Callback):
    """Keeps the loss and the gradient norm of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and "train/loss" in pl_module.last_metrics:
            self.values.append(pl_module.last_metrics["train/loss"])
            self.norms.append(pl_module.last_metrics["train/grad_norm"])


def trainer_for(strategy: Any = "auto", **options: Any) -> Trainer:
    """Return a silent Trainer over all ranks that there are."""
    distributed = torch.distributed.is_initialized()
    defaults = {
        "accelerator": "cpu",
        "devices": torch.distributed.get_world_size() if distributed else 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "max_epochs": -1,
    }
    return Trainer(strategy=strategy, **{**defaults, **options})


def run(
    strategy: Any = "auto",
    *,
    config: TransformerConfig | None = None,
    optimizer: Any = AdamW(lr=1e-2),
    steps: int = 4,
    module: LightningModule | None = None,
    ckpt_path: Any = None,
    save_to: Any = None,
    double: bool = True,
    **options: Any,
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Train a few steps; return losses, gradient norms and whole weights.

    Args:
        strategy: For the Trainer.
        config: Of the model.
        optimizer: Of the module.
        steps: Optimizer steps.
        module: In place of one for pretraining.
        ckpt_path: Where to go on from.
        save_to: Where to write a checkpoint at the end.
        double: Compute in float64; a plugin, because Lightning takes no word for it here.
        **options: For the Trainer.
    """
    config = config or model_config()
    losses = Losses()
    callbacks = [losses, *options.pop("callbacks", [])]
    plugins = [*options.pop("plugins", []), *([DoublePrecision()] if double else [])]
    trainer = trainer_for(strategy, callbacks=callbacks, plugins=plugins, **{"max_steps": steps, **options})
    torch.manual_seed(1)
    module = module or PretrainModule(config, optimizer=optimizer, schedule=Constant())
    trainer.fit(module, Rows(trainer, steps, config.vocab_size), ckpt_path=ckpt_path)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return losses.values, losses.norms, weights_of(module)


def weights_of(module: LightningModule) -> dict[str, torch.Tensor]:
    """Return all weights, whole."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in module.state_dict().items()
    }
