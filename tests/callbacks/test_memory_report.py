"""What is predicted before training against the bytes of the tensors that are there after a step."""

import dataclasses
import io
import json
from itertools import accumulate

import pytest
import rich
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_lm.callbacks import MemoryReport
from lightning_lm.callbacks.memory_report import SavedActivations
from lightning_lm.errors import ConfigurationError
from lightning_lm.models import TransformerConfig, parameter_roles
from lightning_lm.models.summary import cast_bytes
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import SGD, AdamW, CombinedOptimizer, Muon
from lightning_lm.optim.memory import predicted_state_bytes, tensors_in

CONFIG = TransformerConfig(vocab_size=64, d_model=16, num_layers=2, context_length=8)
EXACT = ("parameters", "gradients", "optimizer_states")


@pytest.fixture
def console(monkeypatch):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return console


class Data(LightningDataModule):
    context_length, batch_size = 8, 4

    def __init__(self, batches, loader_of):
        super().__init__()
        self.batches, self.loader_of = batches, loader_of

    def train_dataloader(self):
        return self.loader_of(self.batches)


def state_of(optimizer) -> int:
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in tensors_in(state))


@pytest.mark.parametrize("part", [AdamW(), Muon(), SGD(), SGD(momentum=0.0)])
def test_prediction_is_exact(part, trainer_with, loader_of, batches_of, console):
    report = MemoryReport()
    trainer = trainer_with(report, max_steps=1)
    trainer.fit(PretrainModule(CONFIG, optimizer=part), Data(batches_of([(4, 9)], vocab_size=64), loader_of))
    weights = 4 * sum(p.numel() for p in CONFIG.build().parameters())
    assert (report.predicted.parameters, report.predicted.gradients) == (weights, weights)
    assert report.predicted.optimizer_states == state_of(trainer.optimizers[0])
    assert all(getattr(report.predicted, name) == getattr(report.measured, name) for name in EXACT)
    text = console.file.getvalue()
    assert text.count("Memory of rank 0") == 1
    assert "optimizer states" in text


class Frozen(LightningModule):
    """A module that knows nothing of this package, with half of it frozen and half precision."""

    def __init__(self):
        super().__init__()
        self.kept, self.trained = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 4, dtype=torch.bfloat16)

    def training_step(self, batch, batch_idx):
        return self.trained(self.kept(batch.float()).bfloat16()).sum()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_frozen_and_half_precision_parameters(trainer_with, loader_of, console):
    report = MemoryReport()
    trainer_with(report, max_steps=2, accumulate_grad_batches=2).fit(Frozen(), loader_of([torch.ones(2, 8)] * 4))
    assert report.predicted.parameters == 4 * 72 + 2 * 36
    assert report.predicted.gradients == 2 * 36
    assert report.predicted.optimizer_states == 2 * 2 * 36 + 2 * 4  # and a float32 counter for weight and bias
    assert all(getattr(report.predicted, name) == getattr(report.measured, name) for name in EXACT)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Rprop", "SGD"])
def test_state_of_any_optimizer(kind):
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    predicted = predicted_state_bytes(optimizer)
    assert predicted == predicted_state_bytes(optimizer)  # nothing has changed
    assert predicted_state_bytes(optimizer, lambda param: None) == 0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert predicted == state_of(optimizer)


def test_an_optimizer_that_reads_values_is_counted_by_its_moments():
    class Reading(torch.optim.Optimizer):
        def step(self):
            for group in self.param_groups:
                for param in group["params"]:
                    self.state[param]["seen"] = param.grad.sum().item()

    parameter = nn.Parameter(torch.ones(10))
    assert predicted_state_bytes(Reading([parameter], {"betas": (0.9, 0.99)})) == 2 * 40
    roles = parameter_roles(CONFIG.build())
    assert "matrix" in roles.values()
    assert predicted_state_bytes(CombinedOptimizer([Reading([parameter], {})])) == 0


def test_activations_are_those_that_autograd_keeps():
    x = torch.ones(3, 5)
    layer = nn.Linear(5, 7)
    saved = SavedActivations(layer)
    saved.start()
    out = layer(x).sigmoid()  # keeps its input for the weight, and the sigmoid's output; the weight itself is known
    (out * out).sum()  # keeps the same output again
    saved.stop()
    assert saved.num_bytes == 4 * (3 * 5 + 3 * 7)
    out.sin()
    assert saved.num_bytes == 4 * (3 * 5 + 3 * 7)


def test_counting_changes_nothing(trainer_with, loader_of, batches_of, console):
    def weights(*callbacks):
        torch.manual_seed(0)
        module = PretrainModule(CONFIG, activation_checkpointing="blocks")
        trainer_with(*callbacks, max_steps=2).fit(module, loader_of(batches_of([(2, 9)] * 2, vocab_size=64)))
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    assert torch.equal(weights(), weights(MemoryReport()))


def test_recomputed_layers_keep_less(trainer_with, loader_of, batches_of, console):
    found = {}
    for what in ("none", "blocks"):
        report = MemoryReport()
        config = dataclasses.replace(CONFIG, num_layers=8)
        module = PretrainModule(config, activation_checkpointing=what)
        data = Data(batches_of([(4, 9)], vocab_size=64), loader_of)
        trainer_with(report, max_steps=1).fit(module, data)
        found[what] = report
    for moment in ("predicted", "measured"):
        none, blocks = (getattr(found[what], moment).activations for what in ("none", "blocks"))
        assert blocks < none / 2
    assert 1 / 2 < found["none"].predicted.activations / found["none"].measured.activations < 2
    # What is computed again in the backward pass, one layer at a time, is predicted; it is not there after the forward.
    assert found["blocks"].predicted.activations > found["blocks"].measured.activations


WIDE = TransformerConfig(vocab_size=64, d_model=128, num_layers=6, context_length=8)


def most_allocated(module, *, cache, path):
    """Return the most bytes that a forward pass under autocast allocated at once."""
    ids = torch.zeros(1, 8, dtype=torch.long)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return module.model.hidden(ids)

    forward()  # what is made once and kept is no part of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward()
    profiler.export_chrome_trace(str(path))
    events = (event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]")
    return max(accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))


@pytest.mark.parametrize("what", ["none", "blocks"])
def test_copies_of_weights_under_autocast_are_counted(what, trainer_with, loader_of, batches_of, console, tmp_path):
    """Few tokens in a wide model: the copies are nearly all that is kept."""
    report = MemoryReport()
    module = PretrainModule(WIDE, activation_checkpointing=what)
    data = Data(batches_of([(1, 9)] * 2, vocab_size=64), loader_of)
    data.batch_size = 2  # one row in each micro-batch
    trainer_with(report, max_steps=1, accumulate_grad_batches=2, precision="bf16-mixed").fit(module, data)
    found = most_allocated(module.train(), cache=True, path=tmp_path / "trace.json")
    assert report.predicted.activations == pytest.approx(found, rel=0.1)
    if what == "blocks":
        alone = most_allocated(module, cache=False, path=tmp_path / "trace.json")
        assert found - alone == pytest.approx(cast_bytes(linear_weights(module.model.layers)), rel=0.05)
    else:
        assert report.predicted.activations == pytest.approx(report.measured.activations, rel=0.35)


def linear_weights(module):
    return [part.weight for part in module.modules() if isinstance(part, nn.Linear)]


def test_what_does_not_fit_is_an_error_before_the_first_step(trainer_with, loader_of, batches_of):
    steps = []

    class Module(PretrainModule):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    data = Data(batches_of([(4, 9)], vocab_size=64), loader_of)
    with pytest.raises(ConfigurationError) as caught:
        trainer_with(MemoryReport(capacity_gib=2**-20), max_steps=1).fit(Module(CONFIG), data)
    message = str(caught.value)
    assert "on each device, which has 1.0 KiB" in message
    assert "zero1" in message  # AdamW's states are the largest part
    assert not steps
    trainer_with(MemoryReport(capacity_gib=2**-20, refuse=False), max_steps=1).fit(Module(CONFIG), data)
    assert steps
