"""Supervised fine-tuning: packing changes nothing, documents do not see each other, gradients and metrics are exact."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.modules import DFT, NLL, SFTModule
from lightning_lm.modules.token_losses import next_token_inputs
from lightning_lm.optim import OptimizerPart
from lightning_lm.types import IGNORE_INDEX

VOCAB, WIDTH = 31, 9
TOLERANCE = 1e-6
"""Relative error of float32 sums over some hundred terms, against float64."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = Layer(mixer=Attention(num_heads=2), ffn=GLU())
    return (
        TransformerConfig(vocab_size=VOCAB, d_model=16, num_layers=2, layers=layers, context_length=64).build().double()
    )


@pytest.fixture
def examples():
    """Pairs of ids and labels of several lengths; the first two thirds of each are its prompt."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (5, 9, 3, 7, 2, 6):
        ids = torch.randint(VOCAB, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < max(1, 2 * length // 3), IGNORE_INDEX, ids)
        made.append((ids, labels))
    return made


def single(ids, labels):
    return {"input_ids": ids[None], "labels": labels[None]}


def padded(examples, width=12):
    """One example a row, as anybody would do it; no document ids."""
    ids, labels = torch.zeros(len(examples), width, dtype=torch.long), torch.full((len(examples), width), IGNORE_INDEX)
    for row, (tokens, targets) in enumerate(examples):
        ids[row, : len(tokens)], labels[row, : len(tokens)] = tokens, targets
    return {"input_ids": ids, "labels": labels}


def packed(examples, width=17):
    """Several examples a row, each with its own positions and document."""
    rows, left = [], 0
    for tokens, targets in examples:
        if left < len(tokens):
            rows.append([])
            left = width
        left -= len(tokens)
        rows[-1].append((tokens, targets))
    batch = {name: [] for name in ("input_ids", "labels", "position_ids", "document_ids")}
    for row in rows:
        used = sum(len(tokens) for tokens, _ in row)
        pad = torch.zeros(width - used, dtype=torch.long)
        batch["input_ids"].append(torch.cat([*(tokens for tokens, _ in row), pad]))
        batch["labels"].append(torch.cat([*(targets for _, targets in row), pad + IGNORE_INDEX]))
        batch["position_ids"].append(
            torch.cat([*(torch.arange(len(tokens)) for tokens, _ in row), torch.arange(len(pad))])
        )
        numbers = [torch.full((len(tokens),), number) for number, (tokens, _) in enumerate(row)]
        batch["document_ids"].append(torch.cat([*numbers, pad + len(row)]))
    return {name: torch.stack(values) for name, values in batch.items()}


def gradients(model, loss, batches):
    model.zero_grad()
    total = sum(loss(model, batch).loss.loss_sum for batch in batches)
    total.backward()
    return total.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("loss", [NLL(), DFT()], ids=["nll", "dft"])
def test_packed_and_padded_rows_give_the_sum_over_single_examples(model, examples, loss):
    wanted, wanted_gradient = gradients(model, loss, [single(*example) for example in examples])
    for batch in (packed(examples), padded(examples), packed(examples[::-1], width=33)):
        found, gradient = gradients(model, loss, [batch])
        assert found == pytest.approx(wanted, rel=1e-12)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-12)


def test_the_loss_is_the_one_of_the_definition(model, examples):
    batch = padded(examples)
    log_probs = model(batch["input_ids"][:, :-1]).log_softmax(-1)
    nll = confident = count = 0.0
    for row, targets in enumerate(batch["labels"][:, 1:].tolist()):
        for place, target in enumerate(targets):
            if target != IGNORE_INDEX:
                log_prob = log_probs[row, place, target]
                nll, confident, count = nll - log_prob, confident - log_prob.exp().detach() * log_prob, count + 1
    assert count == 12
    for loss, wanted in ((NLL(), nll), (DFT(), confident)):
        found, gradient = gradients(model, loss, [batch])
        assert found == pytest.approx(wanted.item(), rel=1e-9)
        expected = torch.autograd.grad(wanted, list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(gradient, torch.cat([part.flatten() for part in expected]), rtol=1e-6, atol=1e-9)


def test_another_document_changes_not_a_bit(model, examples):
    batch = packed(examples)
    model = model.float()
    before = model(**next_token_inputs(batch))
    others = batch["document_ids"] != 0
    changed = batch | {"input_ids": torch.where(others, (batch["input_ids"] + 7) % VOCAB, batch["input_ids"])}
    after = model(**next_token_inputs(changed))
    first = ~others[:, :-1]
    assert torch.equal(before[first], after[first])
    assert not torch.allclose(before[~first], after[~first])


def test_nothing_learned_gives_zeros(model, examples):
    batch = packed(examples)
    batch["labels"].fill_(IGNORE_INDEX)
    for loss in (NLL(), DFT(), NLL(z_loss=0.1, label_smoothing=0.1)):
        total, gradient = gradients(model, loss, [batch])
        assert total == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


class Foreign(nn.Module):
    """Returns logits and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, **_):
        return self.inner(input_ids)


@pytest.mark.parametrize("loss", [NLL(), DFT(), NLL(z_loss=0.01, label_smoothing=0.1), DFT(z_loss=0.01)])
def test_a_model_that_only_returns_logits_learns_the_same(model, examples, loss):
    batch = padded(examples)
    ours, theirs = loss(model, batch), loss(Foreign(model), batch)
    for found, wanted in zip((*theirs.loss, *theirs[1:]), (*ours.loss, *ours[1:]), strict=True):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(gradients(Foreign(model), loss, [batch])[1], gradients(model, loss, [batch])[1])


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given and moves nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.seen = []

    def step(self, closure=None):
        assert closure is None  # the combined optimizer has called it
        self.seen.append(torch.cat([p.grad.flatten().double() for p in self.param_groups[0]["params"]]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(OptimizerPart):
    def children(self, parameters):
        return [Recorder([entry.parameter for entry in parameters])]


@pytest.mark.parametrize("loss", [NLL(), DFT()], ids=["nll", "dft"])
@pytest.mark.parametrize("accumulate", [1, 4, 16])
def test_gradients_do_not_depend_on_micro_batches(config, rows, loader, make_trainer, accumulate, loss):
    """A whole window of 16 rows, of which four have nothing to learn, and a partial one of 4."""
    data = rows(20, empty=True)
    torch.manual_seed(0)
    module = SFTModule(config, optimizer=Record(), loss=loss)
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(data, 16 // accumulate))
    check(trainer.optimizers[0].children[0].seen, config, data, loss)


def check(seen, config, data, loss):
    """Compare the gradients of both windows with those of the definition, in float64 from all logits."""
    torch.manual_seed(0)
    model = config.build().double()
    for found, part in zip(seen, (slice(16), slice(16, 20)), strict=True):
        window = {name: value[part] for name, value in data.items()}
        targets = window["labels"][:, 1:]
        log_probs = model(window["input_ids"][:, :-1]).log_softmax(-1)
        chosen = log_probs[targets != IGNORE_INDEX].gather(1, targets[targets != IGNORE_INDEX][:, None])
        weights = chosen.exp().detach() if loss.by_confidence else 1
        wanted = torch.autograd.grad(-(weights * chosen).mean(), list(model.parameters()))
        wanted = torch.cat([gradient.flatten() for gradient in wanted])
        assert (found - wanted).norm() < TOLERANCE * wanted.norm()


class Writer(SFTModule):
    """Leaves what its rank saw in a file, since the ranks of a test are other processes."""

    folder = None

    def on_fit_end(self):
        torch.save(self.trainer.optimizers[0].children[0].seen, self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize(("loss", "accumulate"), [(NLL(), 1), (DFT(), 4)], ids=["nll", "dft"])
def test_gradients_do_not_depend_on_processes(config, rows, loader, make_trainer, tmp_path, loss, accumulate):
    data = rows(20, empty=True)
    data["labels"][1:16:2] = IGNORE_INDEX  # the second rank has nothing to learn in the first window
    torch.manual_seed(0)
    module = Writer(config, optimizer=Record(), loss=loss)
    module.folder = tmp_path
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate, devices=2, strategy=strategy)
    size = 8 // accumulate

    class Shares:
        def __len__(self):
            return len(loader(data, size, ranks=2))

        def __iter__(self):
            return iter(loader(data, size, rank=trainer.global_rank, ranks=2))

    trainer.fit(module, Shares())
    for rank in range(2):
        check(torch.load(tmp_path / f"{rank}.pt", weights_only=True), config, data, loss)


def expected_metrics(model, batch):
    targets = batch["labels"][:, 1:]
    logits = model(batch["input_ids"][:, :-1])[targets != IGNORE_INDEX].double()
    chosen = targets[targets != IGNORE_INDEX]
    return {
        "loss": F.cross_entropy(logits, chosen).item(),
        "token_accuracy": (logits.argmax(-1) == chosen).double().mean().item(),
        "entropy": torch.distributions.Categorical(logits=logits).entropy().mean().item(),
    }


@pytest.mark.parametrize("size", [4, 16])
def test_metrics_are_means_over_tokens_whatever_the_batches(config, rows, loader, make_trainer, size):
    train, validation = rows(16, empty=True), rows(10, seed=1)
    torch.manual_seed(0)
    module = SFTModule(config, optimizer=Record())
    trainer = make_trainer(
        max_steps=1,
        accumulate_grad_batches=16 // size,
        log_every_n_steps=1,
        val_check_interval=16 // size,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, loader(train, size), loader(validation, 3))
    with torch.no_grad():
        wanted = {f"train/{name}": value for name, value in expected_metrics(module.model, train).items()}
        wanted |= {f"val/{name}": value for name, value in expected_metrics(module.model, validation).items()}
    learned = train["labels"] != IGNORE_INDEX
    wanted["train/num_tokens"] = sum(int(row.nonzero().max()) + 1 for row in learned if row.any())
    assert {name: module.last_metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_it_learns_by_heart(config, rows, loader, make_trainer):
    from lightning_lm.optim import AdamW, Constant

    torch.manual_seed(0)
    module = SFTModule(config, optimizer=AdamW(lr=0.01), schedule=Constant())
    trainer = make_trainer(max_epochs=60, log_every_n_steps=1)
    trainer.fit(module, loader(rows(4), 4))
    assert module.last_metrics["train/token_accuracy"] == 1
    assert module.last_metrics["train/loss"] < 0.2
