"""DPO against a float64 computation from all logits, and its gradient however the pairs are cut."""

import dataclasses
import math

import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from pairs_in_pieces import Pieces, part_of
from recorded_gradients import Record
from torch import nn
from torch.nn import functional as F

from lightning_lm.data import EncodedPair, PairStream, PreferencePairs
from lightning_lm.datamodules.loader import DataShard, Loading, TrainLoader
from lightning_lm.functional.preference import IPO, ChosenNLL, Sigmoid, SimPO, WeightedLosses
from lightning_lm.modules import CopyReference, DPOModule, SlowSync
from lightning_lm.optim import AdamW, Constant
from lightning_lm.types import IGNORE_INDEX

VOCAB = 31
TOLERANCE = 1e-6
PAIRS, WINDOW = 20, 16
"""One full window of 16 pairs and a partial one of 4."""


def ragged_pairs(count, seed=0) -> PreferencePairs:
    generator = torch.Generator().manual_seed(seed)

    def ids(longest):
        size = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(VOCAB, (size,), generator=generator).tolist()

    return PreferencePairs(EncodedPair(ids(3), ids(5), ids(5), 0.0, False) for _ in range(count))


def whole_batch(count=PAIRS, *, empty=()) -> dict[str, torch.Tensor]:
    batch = PairStream(ragged_pairs(count), shuffle=False).batch(torch.arange(count).numpy())
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    for pair in empty:
        tensors["labels"][[pair, pair + count]] = IGNORE_INDEX
    return tensors


class Logged(Logger):
    name, version = "logged", 0

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.seen.setdefault(step, {}).update(metrics)


# --- the oracle: all logits, float64, one row at a time ---


def answer_logprob(model, row, label):
    kept = label != IGNORE_INDEX
    end = int(kept.nonzero().max()) + 1 if kept.any() else 1
    logp = model(row[None, :end]).log_softmax(-1)[0]
    return sum(
        (logp[place - 1, row[place]] for place in range(1, end) if kept[place]), torch.zeros((), dtype=logp.dtype)
    )


def naive(model, reference, batch, loss, beta=0.1):
    """Sum of the loss over pairs with labels, and their number, as a textbook would write it."""
    total, count, pairs = torch.zeros((), dtype=torch.float64), 0, len(batch["margin"])
    for pair in range(pairs):
        rows = [(batch["input_ids"][row], batch["labels"][row]) for row in (pair, pair + pairs)]
        sizes = [int((label != IGNORE_INDEX).sum()) for _, label in rows]
        if 0 in sizes:
            continue
        chosen, rejected = (answer_logprob(model, *row) for row in rows)
        with torch.no_grad():
            of_chosen, of_rejected = (answer_logprob(reference, *row) for row in rows)
        good, bad = chosen - of_chosen, rejected - of_rejected
        if loss == "sigmoid":
            total = total + torch.log1p(torch.exp(-beta * (good - bad)))
        elif loss == "ipo":
            total = total + (good / sizes[0] - bad / sizes[1] - 1 / (2 * beta)) ** 2
        elif loss == "simpo":
            total = total + torch.log1p(torch.exp(-2 * (chosen / sizes[0] - rejected / sizes[1]) + 1))
        elif loss == "mixed":
            total = total + torch.log1p(torch.exp(-beta * (good - bad))) - 0.5 * chosen / sizes[0]
        count += 1
    return total, count


LOSSES = {
    "sigmoid": Sigmoid(),
    "ipo": IPO(),
    "simpo": SimPO(),
    "mixed": WeightedLosses(losses=(Sigmoid(), ChosenNLL()), weights=(1.0, 0.5)),
}


def build(config, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return config.build()


def moved(model, by=0.05) -> nn.Module:
    """Move a model away from its reference."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def moved_module(config, kind=DPOModule, **settings) -> DPOModule:
    """A module whose policy has left its reference."""
    module = kind(build(config), **settings)
    module.configure_model()
    moved(module.model)
    return module


def exact(config, batch, loss):
    reference, model = build(config).double(), moved(build(config)).double()
    total, count = naive(model, reference, batch, loss)
    (total / max(1, count)).backward()
    return {name: param.grad for name, param in model.named_parameters()}, total.item() / max(1, count)


def distance(found, wanted) -> float:
    difference = sum((found[name].double() - wanted[name]).square().sum() for name in wanted)
    return (difference / sum(value.square().sum() for value in wanted.values())).sqrt().item()


# --- the first step ---


@pytest.fixture
def fit(config, make_trainer):
    def run(module, batch, *, size=WINDOW, logger=None, **settings):
        logger = logger or Logged()
        trainer = make_trainer(**{"max_epochs": 1, "logger": logger, "log_every_n_steps": 1, **settings})
        trainer.fit(module, Pieces(batch, size, trainer))
        return trainer, logger.seen

    return run


def test_begins_at_log_two_with_every_pair_tied(config, fit):
    """With dropout in the config: it is off, in the policy as in the reference, so both say the very same."""
    torch.manual_seed(0)
    module = DPOModule(dataclasses.replace(config, dropout=0.5), optimizer=Record())
    _, seen = fit(module, whole_batch(16))
    (first,) = seen.values()
    assert abs(first["train/loss"] - math.log(2)) < 1e-6
    assert first["train/rewards/margins"] == first["train/rewards/chosen"] == first["train/rewards/rejected"] == 0.0
    assert first["train/rewards/accuracies"] == 0.5


def test_the_margin_of_every_pair_is_exactly_zero_at_first(config):
    module = DPOModule(build(config))
    module.configure_model()
    module.train()
    batch = whole_batch()
    mine = module.reference.logprobs(module.model, batch)
    from lightning_lm.modules.token_losses import token_scores

    theirs = token_scores(module.model, batch).logprobs.sum(-1)
    assert torch.equal(mine, theirs.detach())
    assert theirs.requires_grad
    assert not mine.requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_those_of_a_textbook(config, fit, loss):
    batch = whole_batch(16, empty=[3])
    module = moved_module(config, loss=LOSSES[loss], optimizer=Record())
    assert (module.reference is None) == (loss == "simpo")
    trainer, seen = fit(module, batch)
    wanted, value = exact(config, batch, loss)
    (found,) = trainer.optimizers[0].children[0].seen
    assert distance(found, wanted) < TOLERANCE
    assert seen[1]["train/loss"] == pytest.approx(value, rel=1e-5)


def test_the_numbers_that_are_logged(config, fit):
    batch = whole_batch(16, empty=[3])
    _, seen = fit(moved_module(config, optimizer=Record()), batch, size=4, accumulate_grad_batches=4)
    reference, model = build(config).double(), moved(build(config)).double()
    kept = [pair for pair in range(16) if pair != 3]
    with torch.no_grad():
        of_model, of_reference = (
            torch.stack([answer_logprob(net, *row) for row in zip(batch["input_ids"], batch["labels"], strict=True)])
            for net in (model, reference)
        )
    rewards = 0.1 * (of_model - of_reference)
    chosen, rejected = rewards[:16][kept], rewards[16:][kept]
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": of_model[:16][kept].mean(),
        "logps/rejected": of_model[16:][kept].mean(),
        "tokens": (batch["labels"] != IGNORE_INDEX).sum(),
    }
    for name, value in expected.items():
        assert seen[1][f"train/{name}"] == pytest.approx(value.item(), rel=1e-4), name


# --- cuts ---


@pytest.mark.parametrize("accumulate", [1, 4, 16])
def test_micro_batches_do_not_change_the_gradient(config, fit, accumulate):
    """Pairs 4 to 7 count nothing: with 4 micro-batches one of them is empty."""
    batch = whole_batch(empty=range(4, 8))
    module = moved_module(config, optimizer=Record())
    trainer, _ = fit(module, batch, size=WINDOW // accumulate, accumulate_grad_batches=accumulate)
    seen = trainer.optimizers[0].children[0].seen
    assert len(seen) == 2
    for found, part in zip(seen, (slice(WINDOW), slice(WINDOW, PAIRS)), strict=True):
        assert distance(found, exact(config, part_of(batch, part), "sigmoid")[0]) < TOLERANCE


class Writer(DPOModule):
    """Leaves what its rank saw in a file, since the ranks of a test are other processes."""

    folder = None

    def on_fit_end(self):
        torch.save(self.trainer.optimizers[0].children[0].seen, self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize("accumulate", [1, 4])
def test_processes_do_not_change_the_gradient(config, fit, tmp_path, accumulate):
    batch = whole_batch(empty=range(1, WINDOW, 2))  # the second rank has nothing to learn in the first window
    module = moved_module(config, Writer, optimizer=Record())
    module.folder = tmp_path
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    size = WINDOW // 2 // accumulate
    fit(module, batch, size=size, accumulate_grad_batches=accumulate, devices=2, strategy=strategy)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for found, part in zip(seen, (slice(WINDOW), slice(WINDOW, PAIRS)), strict=True):
            found = {name.removeprefix("module."): value for name, value in found.items()}
            assert distance(found, exact(config, part_of(batch, part), "sigmoid")[0]) < TOLERANCE


def test_a_window_in_which_nothing_counts_gives_zeros(config, fit):
    module = moved_module(config, optimizer=Record())
    trainer, _ = fit(module, whole_batch(8, empty=range(8)), size=4, accumulate_grad_batches=2)
    (found,) = trainer.optimizers[0].children[0].seen
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found.values())


# --- padding ---


def test_padding_never_counts(config):
    """Whatever stands in the padding, and however wide it is: ids that are real tokens elsewhere, or all the same."""
    module = moved_module(config)
    batch = whole_batch(8)
    loss = module.training_loss(batch).loss_sum
    width = batch["input_ids"].shape[1]
    wide = {name: F.pad(value, (0, 7)) if value.dim() == 2 else value for name, value in batch.items()}
    wide["labels"][:, width:] = IGNORE_INDEX
    outside = torch.arange(width + 7) >= wide["lengths"][:, None]
    for fill in (0, VOCAB - 1):
        wide["input_ids"][outside] = fill
        assert module.training_loss(wide).loss_sum.item() == pytest.approx(loss.item(), abs=1e-5)


def test_padding_on_the_left_needs_positions_and_documents(config):
    """Rows of others may be padded on the left: with positions from 0 and the padding as a document of its own."""
    module = moved_module(config)
    batch = whole_batch(8)
    loss = module.training_loss(batch).loss_sum
    rows = {name: torch.zeros_like(batch["input_ids"]) for name in ("input_ids", "position_ids", "document_ids")}
    rows["labels"] = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    for row, length in enumerate(batch["lengths"].tolist()):
        rows["input_ids"][row, -length:] = batch["input_ids"][row, :length]
        rows["labels"][row, -length:] = batch["labels"][row, :length]
        rows["position_ids"][row, -length:] = torch.arange(length)
        rows["document_ids"][row, -length:] = 1
    assert module.training_loss({**batch, **rows}).loss_sum.item() == pytest.approx(loss.item(), abs=1e-5)


# --- a run ---


class Data:
    """What a datamodule would give: pairs in a random order, from wherever the optimizer stands."""

    def __init__(self, trainer, size=4):
        self.trainer, self.size = trainer, size
        self.stream = PairStream(ragged_pairs(50))

    def loader(self):
        position = lambda: self.trainer.global_step * self.size  # noqa: E731
        return TrainLoader(self.stream, DataShard.of(self.trainer, self.size), position, Loading())


@pytest.fixture
def run(config, make_trainer, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def go(steps, folder, *, resume=None, **settings):
        torch.manual_seed(3)
        module = DPOModule(config, optimizer=AdamW(lr=1e-2), schedule=Constant(), **settings)
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        logger = Logged()
        trainer = make_trainer(
            max_steps=steps,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            log_every_n_steps=1,
            logger=logger,
            callbacks=[saver],
            enable_checkpointing=True,
        )
        trainer.fit(module, Data(trainer).loader(), ckpt_path=resume)
        return module, logger.seen

    return go


@pytest.mark.parametrize("sync", [None, SlowSync(alpha=0.5, every=2)])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumes_bit_for_bit(run, tmp_path, stop, sync):
    """The reference of the resumed run is the one that the first run had, not the policy at the checkpoint."""
    whole, expected = run(5, "whole", reference=CopyReference(sync=sync))
    resumed, found = run(5, "rest", reference=CopyReference(sync=sync), resume=tmp_path / "whole" / f"step={stop}.ckpt")
    first, second = whole.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    assert any(name.startswith("reference.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert found == {step: metrics for step, metrics in expected.items() if step > stop}


def test_training_raises_the_margin_and_leaves_the_reference(config, fit):
    module = DPOModule(build(config), optimizer=AdamW(lr=1e-3, weight_decay=0.0), schedule=Constant())
    _, seen = fit(module, whole_batch(8), size=8, max_epochs=8)
    assert seen[8]["train/rewards/margins"] > seen[2]["train/rewards/margins"] > 0
    assert seen[8]["train/loss"] < seen[2]["train/loss"] < math.log(2)
    begin = build(config).state_dict()
    assert all(torch.equal(value, begin[name]) for name, value in module.reference.model.state_dict().items())
    assert not all(torch.equal(value, begin[name]) for name, value in module.model.state_dict().items())


def test_the_trained_policy_loads_without_its_reference(run, tmp_path):
    from lightning_lm.modules import load_model

    module, _ = run(2, "runs")
    model, tokenizer = load_model(tmp_path / "runs" / "step=2.ckpt")
    assert tokenizer is None
    assert all(torch.equal(value, module.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_validation_is_over_pairs_whatever_the_batches(config, make_trainer):
    found = []
    for size in (3, 20):
        module = moved_module(config)
        trainer = make_trainer()
        trainer.validate(module, Pieces(whole_batch(), size, trainer), verbose=False)
        found.append(module.last_metrics)
    reference, model = build(config).double(), moved(build(config)).double()
    total, count = naive(model, reference, whole_batch(), "sigmoid")
    for metrics in found:
        assert metrics["val/loss"] == pytest.approx(total.item() / count, rel=1e-5)
        assert metrics["val/rewards/accuracies"] == found[0]["val/rewards/accuracies"]
    assert found[0].keys() == found[1].keys() >= {"val/logps/chosen", "val/rewards/margins", "val/entropy"}


def test_models_of_transformers_train_as_they_are(make_trainer):
    """Also with dropout on in their config, and without the pieces that save memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    module = DPOModule(GPT2LMHeadModel(settings).train(), optimizer=Record())
    trainer = make_trainer(max_steps=1, log_every_n_steps=1)
    trainer.fit(module, Pieces(whole_batch(8), 8, trainer))
    assert module.last_metrics["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
