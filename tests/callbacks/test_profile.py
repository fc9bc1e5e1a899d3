"""Where time goes: phases and roles that add up, floors from counted work, files that tools can read."""

import json
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_lm.callbacks import Profile
from lightning_lm.callbacks.module_times import Ceilings, RoleTime, module_times
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule

CPU = torch.device("cpu")


class SlowNorm(nn.Module):
    """Takes longer than everything else."""

    def forward(self, x):
        time.sleep(0.02)
        return x * 1.0


class MLP(nn.Module):
    """Sleeps itself, and holds something that sleeps."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = SlowNorm(), nn.Linear(8, 16)

    def forward(self, x):
        time.sleep(0.01)
        return self.up(self.norm(x))


def test_the_time_of_what_is_inside_is_taken_off():
    model = nn.Sequential(MLP())
    with module_times(model, CPU) as times:
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert times["norms"].forward_s >= 0.02
    assert 0.01 <= times["feed-forward, the rest"].forward_s < 0.02
    assert times["feed-forward projections"].flops == 2 * 4 * 8 * 16
    assert times["feed-forward projections"].bytes == 4 * (4 * 8 + 4 * 16 + 8 * 16 + 16)
    assert times["feed-forward projections"].backward_s > 0
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_the_floor_is_the_slower_of_products_and_memory_three_times():
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0)
    assert ceilings.floor_s(RoleTime(flops=50.0, bytes=1.0)) == pytest.approx(1.5)
    assert ceilings.floor_s(RoleTime(flops=50.0, bytes=20.0)) == pytest.approx(6.0)


def fitted(module, callback, batches=12, **options):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 50, (2 * batches, 16))]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, callbacks=[callback], enable_model_summary=False, **quiet, **options)
    trainer.fit(module, DataLoader(rows, batch_size=2))


def test_a_run_prints_its_table_once_and_writes_a_trace(tmp_path, caplog):
    torch.manual_seed(0)
    layer = Layer(mixer=Attention(num_heads=2), ffn=GLU())
    module = PretrainModule(TransformerConfig(vocab_size=50, d_model=32, num_layers=2, layers=layer))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fitted(module, Profile(warmup=2, steps=3, folder=tmp_path / "here"), accumulate_grad_batches=2)
    (table,) = (text for text in caplog.messages if text.startswith("Profile of 3 batches after 2"))
    begins = [line.split("  ")[0] for line in table.splitlines()]
    assert {"forward", "backward", "optimizer", "norms", "attention projections", "head, loss, the rest"} <= {*begins}
    shares = [int(line.split("%")[0].split()[-1]) for line in table.splitlines() if "%" in line]
    assert sum(shares[:3]) == pytest.approx(100, abs=2)
    assert sum(shares[3:]) == pytest.approx(100, abs=5)
    events = json.loads((tmp_path / "here" / "trace.json").read_text())["traceEvents"]
    assert any("mm" in str(event.get("name")) for event in events)
    assert not any(part._forward_hooks for part in module.modules())


class Any(LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, _):
        return self.layer(batch["input_ids"].float()[:, :4]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_run_that_is_too_short_ends_as_ever(tmp_path):
    fitted(Any(), Profile(folder=tmp_path), batches=2)
    assert list(tmp_path.iterdir()) == []
