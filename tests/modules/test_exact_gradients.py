"""The gradient of an optimizer step is that of the mean over all its target tokens, however the rows are cut."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from recorded_gradients import Record

from lightning_lm.modules import CrossEntropy, PretrainModule
from lightning_lm.types import IGNORE_INDEX

ROWS, WINDOW = 20, 16
"""One full window of 16 rows and a partial one of 4."""
TOLERANCE = 1e-6


def exact(config, rows, **options):
    """Gradients of one batch of all rows in float64, with torch's own cross-entropy."""
    torch.manual_seed(0)
    model = config.build().double()
    targets = rows["labels"][:, 1:].flatten()
    logits = model(rows["input_ids"][:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", **options)
    (loss / max(1, (targets != IGNORE_INDEX).sum().item())).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def windows(rows):
    return [{name: value[part] for name, value in rows.items()} for part in (slice(WINDOW), slice(WINDOW, ROWS))]


def distance(found, wanted) -> float:
    """Norm of the difference over the norm, all parameters together."""
    difference = sum((found[name].double() - wanted[name]).square().sum() for name in wanted)
    return (difference / sum(value.square().sum() for value in wanted.values())).sqrt().item()


def train(config, rows, loader, trainer, *, size, path=None, module=None):
    torch.manual_seed(0)
    module = module or PretrainModule(config, optimizer=Record())
    ranks = trainer.num_devices

    class Shares:
        def __len__(self):
            return len(loader(rows, size, ranks=ranks))

        def __iter__(self):
            return iter(loader(rows, size, rank=trainer.global_rank, ranks=ranks))

    trainer.fit(module, Shares())
    return module


@pytest.mark.parametrize("accumulate", [1, 4, 16])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_one_process(config, rows, loader, make_trainer, accumulate, clip):
    data = rows(ROWS, empty=True)
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    train(config, data, loader, trainer, size=WINDOW // accumulate)
    seen = trainer.optimizers[0].children[0].seen
    assert len(seen) == 2
    for found, window in zip(seen, windows(data), strict=True):
        wanted = exact(config, window)
        if clip:
            norm = sum(value.square().sum() for value in wanted.values()).sqrt()
            assert norm > clip
            wanted = {name: value * clip / (norm + 1e-6) for name, value in wanted.items()}
        assert distance(found, wanted) < TOLERANCE


class Writer(PretrainModule):
    """Leaves what its rank saw in a file, since the ranks of a test are other processes."""

    folder = None

    def on_fit_end(self):
        torch.save(self.trainer.optimizers[0].children[0].seen, self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_processes(config, rows, loader, make_trainer, tmp_path, accumulate):
    data = rows(ROWS, empty=True)
    data["labels"][1:WINDOW:2] = IGNORE_INDEX  # the second rank has nothing to learn in the first window
    trainer = make_trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        devices=2,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
    )
    module = Writer(config, optimizer=Record())
    module.folder = tmp_path
    train(config, data, loader, trainer, size=WINDOW // 2 // accumulate, module=module)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for found, window in zip(seen, windows(data), strict=True):
            wanted = exact(config, window)
            assert distance({name.removeprefix("module."): value for name, value in found.items()}, wanted) < TOLERANCE


def test_the_options_of_the_loss_take_part(config, rows, loader, make_trainer):
    data = rows(ROWS, empty=True)
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=4)
    torch.manual_seed(0)
    module = PretrainModule(config, optimizer=Record(), loss=CrossEntropy(label_smoothing=0.1))
    train(config, data, loader, trainer, size=4, module=module)
    for found, window in zip(trainer.optimizers[0].children[0].seen, windows(data), strict=True):
        assert distance(found, exact(config, window, label_smoothing=0.1)) < TOLERANCE


def test_a_window_without_targets_gives_zeros(config, rows, loader, make_trainer):
    data = rows(ROWS, empty=True)
    data["labels"].fill_(IGNORE_INDEX)
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=1.0)
    train(config, data, loader, trainer, size=4)
    for found in trainer.optimizers[0].children[0].seen:
        assert all(torch.equal(value, torch.zeros_like(value)) for value in found.values())


def test_the_scaler_of_fp16_does_not_change_the_gradient(config, rows, loader, make_trainer):
    """Autocast is off, so that nothing but scaling and unscaling is left of mixed precision."""

    class Scaled(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    data = rows(ROWS, empty=True)
    precision = Scaled("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=4, plugins=[precision], gradient_clip_val=1e6)
    train(config, data, loader, trainer, size=4)
    for found, window in zip(trainer.optimizers[0].children[0].seen, windows(data), strict=True):
        assert distance(found, exact(config, window)) < TOLERANCE


def test_what_backward_gets_is_small_enough_for_fp16(config, rows, loader, make_trainer):
    """A sum over many rows would overflow; it is scaled to the size of a mean over positions."""
    seen = []

    class Watch(PretrainModule):
        def training_step(self, batch, batch_idx):
            seen.append(super().training_step(batch, batch_idx))
            return seen[-1]

    data = {name: value.repeat(50, 1) for name, value in rows(ROWS, empty=True).items()}
    train(config, data, loader, make_trainer(max_epochs=1), size=500, module=Watch(config, optimizer=Record()))
    assert all(value.item() < 10 for value in seen)
