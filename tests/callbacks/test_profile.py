"""Where time goes: phases and roles that add up, floors from counted work, files that tools can read."""

import json

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


class Clock:
    """Stands still unless it is set forward."""

    def __init__(self):
        self.time_s = 0.0

    def __call__(self, device):
        return self.time_s


class SlowNorm(nn.Module):
    """Takes two seconds."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def forward(self, x):
        self.clock.time_s += 2
        return x * 1.0


class MLP(nn.Module):
    """Takes a second itself, and holds something that takes two."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.norm, self.up = clock, SlowNorm(clock), nn.Linear(8, 16)

    def forward(self, x):
        self.clock.time_s += 1
        return Tick.apply(self.up(self.norm(x)), self.clock)


def test_the_time_of_what_is_inside_is_taken_off(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lightning_lm.callbacks.module_times.now", clock)
    model = nn.Sequential(MLP(clock))
    with module_times(model, CPU) as times:
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert times["norms"].forward_s == 2
    assert times["feed-forward, the rest"].forward_s == 1 + 2
    assert times["feed-forward, the rest"].backward_s == 3
    assert times["feed-forward projections"].forward_s == 0
    assert times["feed-forward projections"].flops == 2 * 4 * 8 * 16
    assert times["feed-forward projections"].bytes == 4 * (4 * 8 + 4 * 16 + 8 * 16 + 16)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_the_floor_is_the_slower_of_products_and_memory_three_times():
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0)
    assert ceilings.floor_s(RoleTime(flops=50.0, bytes=1.0, backward_s=1.0)) == pytest.approx(1.5)
    assert ceilings.floor_s(RoleTime(flops=50.0, bytes=20.0, backward_s=1.0)) == pytest.approx(6.0)
    assert ceilings.floor_s(RoleTime(flops=50.0, bytes=20.0)) == pytest.approx(2.0)  # frozen, or an embedding


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
    assert sum(shares[:4]) == pytest.approx(100, abs=2)
    assert sum(shares[5:]) == pytest.approx(100, abs=5)
    events = json.loads((tmp_path / "here" / "trace.json").read_text())["traceEvents"]
    assert any("mm" in str(event.get("name")) for event in events)
    (forward,) = (event for event in events if event.get("cat") == "user_annotation" and event["name"] == "forward")
    (backward,) = (event for event in events if event.get("cat") == "user_annotation" and event["name"] == "backward")
    assert forward["ts"] + forward["dur"] <= backward["ts"]
    assert not any(part._forward_hooks for part in module.modules())


class Tick(torch.autograd.Function):
    """Takes two seconds forward, three backward."""

    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        clock.time_s += 2
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.time_s += 3
        return grad, None


class Timed(LightningModule):
    """A module whose steps take a known time, as does its data."""

    def __init__(self, clock):
        super().__init__()
        self.layer, self.clock = nn.Linear(4, 1), clock

    def training_step(self, batch, _):
        return Tick.apply(self.layer(batch["input_ids"].float()[:, :4]), self.clock).mean()

    def on_before_zero_grad(self, optimizer):
        self.clock.time_s += 6

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *_):
        self.clock.time_s += 4


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 3), (2, 4)])
def test_phases_add_up_to_the_time_of_a_batch(tmp_path, caplog, monkeypatch, accumulated, steps):
    clock = Clock()
    monkeypatch.setattr("lightning_lm.callbacks.profile.now", clock)
    callback = Profile(warmup=2, steps=steps, folder=tmp_path)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fitted(Timed(clock), callback, batches=steps + 7, accumulate_grad_batches=accumulated)
    (table,) = (text for text in caplog.messages if text.startswith("Profile of"))
    found = {line[:28].strip(): float(line[28:].split()[0]) / 1e3 for line in table.splitlines()[2:7]}
    # The optimizer's six seconds, a call before each window, are inside of a forward phase or between batches.
    assert found["forward"] + found["between batches"] + found["optimizer"] == pytest.approx(2 + 4 + 6 / accumulated)
    assert found["backward"] == pytest.approx(3)
    assert found["a batch"] == pytest.approx(9 + 6 / accumulated)
    assert f"{2 * 15 / found['a batch']:,.0f} tokens/s" in table


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
