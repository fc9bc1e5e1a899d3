"""Small runs for the tests of sharded optimizers: one model, five optimizers, through a Trainer or in a loop."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import distributed, nn

from lightning_lm.optim import CombinedOptimizer, MuonOptimizer

__all__ = ["OPTIMIZERS", "Run", "TinyModule", "Windows", "fit", "in_a_loop", "make_trainer", "weights_of"]

VOCAB, WIDTH, LENGTH = 97, 12, 6
SPLIT = 600
"""Size from which the tests split by rows: the embedding and the wide matrix."""


class Whitened(torch.optim.Optimizer):
    """SOAP-like: statistics of rows and columns in a list, and a step that needs the whole matrix."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group["lr"])

    def _update(self, param, lr):
        grad = param.grad.view(-1, 1) if param.dim() < 2 else param.grad
        state = self.state[param]
        if not state:
            state["steps"] = 0
            state["statistics"] = [grad.new_zeros(size, size) for size in grad.shape]
        state["steps"] += 1
        for statistic, product in zip(state["statistics"], (grad @ grad.mT, grad.mT @ grad), strict=True):
            statistic.mul_(0.9).add_(product, alpha=0.1)
        rows, columns = (statistic.trace().add(1e-6).sqrt() for statistic in state["statistics"])
        mixed = (state["statistics"][0] @ grad / rows + grad @ state["statistics"][1] / columns) / (rows + columns)
        param.sub_((lr * (grad + mixed)).view_as(param))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(5 * WIDTH, WIDTH)

    def forward(self, features):
        return features + self.down(torch.tanh(self.up(self.norm(features))))


class Tiny(nn.Module):
    """A language model with tied embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def loss(self, rows):
        logits = self.head(self.blocks(self.embedding(rows[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def muon(model):
    matrices = list(model.blocks.parameters())
    matrices, vectors = [[p for p in matrices if (p.dim() == 2) is wanted] for wanted in (True, False)]
    rest = [model.embedding.weight, *vectors]
    return CombinedOptimizer([MuonOptimizer(matrices, lr=0.01), torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1)])


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.1),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.1, fused=True),
    "muon": muon,
    "whole": lambda model: Whitened(model.parameters()),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained and how; the same for one process and for many."""

    optimizer: str = "adamw"
    clip: float | None = None
    accumulate: int = 1
    windows: int = 10
    partial: int = 0
    """Micro-batches of a last window that is not full."""
    rows: int = 12
    """Rows of a micro-batch, over all ranks."""
    double: bool = False
    scheduled: bool = True

    def micro_batches(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        count = self.windows * self.accumulate + self.partial
        return list(torch.randint(VOCAB, (count, self.rows, LENGTH), generator=generator))

    def model(self) -> Tiny:
        torch.manual_seed(1)
        return Tiny().double() if self.double else Tiny()


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


class TinyModule(LightningModule):
    """The run as any LightningModule would write it."""

    def __init__(self, run: Run):
        super().__init__()
        self.run, self.model, self.losses = run, run.model(), []

    def training_step(self, batch, batch_idx):
        loss = self.model.loss(batch)
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.losses.append(float(mean))
        return loss

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.run.optimizer](self.model)
        if not self.run.scheduled:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


class Windows:
    """This rank's share of every micro-batch, from any micro-batch on."""

    def __init__(self, run: Run, *, start: int = 0, stop: int | None = None):
        initialized = distributed.is_available() and distributed.is_initialized()
        self.rank, self.ranks = (distributed.get_rank(), distributed.get_world_size()) if initialized else (0, 1)
        self.batches = run.micro_batches()[start:stop]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter([batch[self.rank :: self.ranks] for batch in self.batches])


def make_trainer(strategy: Any = "auto", **settings: Any) -> Trainer:
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    quiet = {
        "accelerator": "cpu",
        "devices": world_size,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "max_epochs": 1,
    }
    return Trainer(strategy=strategy, **{**quiet, **settings})


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def fit(run: Run, strategy: Any, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Train on all ranks and return the weights of this one."""
    module = TinyModule(run)
    trainer = make_trainer(
        strategy,
        gradient_clip_val=run.clip,
        accumulate_grad_batches=run.accumulate,
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(module, Windows(run))
    return weights_of(module.model)


def in_a_loop(run: Run) -> dict[str, torch.Tensor]:
    """Do the same in one process, without Lightning."""
    model = run.model()
    optimizer = OPTIMIZERS[run.optimizer](model)
    scheduler = schedule(optimizer)
    batches = run.micro_batches()
    for start in range(0, len(batches), run.accumulate):
        optimizer.zero_grad()
        for batch in batches[start : start + run.accumulate]:
            (model.loss(batch) / run.accumulate).backward()
        if run.clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            assert norm > run.clip  # otherwise nothing would be tested
        optimizer.step()
        if run.scheduled:
            scheduler.step()
    return weights_of(model)
