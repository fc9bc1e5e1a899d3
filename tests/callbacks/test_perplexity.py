"""Perplexity against float64 sums made here, over every way in which a module may hand out what it predicts."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lm.callbacks import Perplexity
from lightning_lm.errors import ConfigurationError

RAGGED = [(3, 9), (1, 2), (4, 17), (2, 5), (1, 33)]
RELATIVE = 1e-6  # float32 logits summed in float64


def oracle(module, batches):
    """Nats per target in float64, position by position."""
    nll, count = 0.0, 0
    model = module.double().eval()
    with torch.no_grad():
        for batch in batches:
            logp = model(batch["input_ids"]).log_softmax(-1)
            for row, labels in enumerate(batch["labels"].tolist()):
                for position, label in enumerate(labels[1:]):
                    if label != -100:
                        nll -= float(logp[row, position, label])
                        count += 1
    module.float()
    return nll, count


def num_bytes(batches):
    return sum(int(((b["labels"][:, 1:] >= 0) & (b["labels"][:, 1:] != 255)).sum()) for b in batches)


def validate(trainer, module, batches, loader_of):
    (metrics,) = trainer.validate(module, loader_of(batches), verbose=False)
    return metrics


def outputs_of(kind):
    def step(self, batch, batch_idx):
        logits = self(batch["input_ids"])
        if kind == "mapping":
            return {"loss": torch.tensor(0.0), "logits": logits}
        if kind == "attribute":
            return SimpleNamespace(logits=logits)
        if kind == "tensor":
            return logits
        if kind == "shifted":
            return logits[:, :-1]
        if kind == "loss":
            return logits.sum()
        targets = batch["labels"][:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
        return {"nll_sum": losses, "num_tokens": (targets != -100).sum()}

    return step


@pytest.mark.parametrize("kind", ["none", "loss", "mapping", "attribute", "tensor", "shifted", "sums"])
def test_equals_the_float64_value_however_predictions_come(
    kind, foreign_module, batches_of, loader_of, trainer_with, tokenizer
):
    cls = foreign_module if kind == "none" else type("M", (foreign_module,), {"validation_step": outputs_of(kind)})
    module, batches = cls(), batches_of(RAGGED)
    metrics = validate(trainer_with(Perplexity(tokenizer)), module, batches, loader_of)
    nll, count = oracle(module, batches)
    assert metrics["val/loss"] == pytest.approx(nll / count, rel=RELATIVE)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert metrics["val/bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes(batches), rel=RELATIVE)


def test_evaluate_batch_is_used_and_the_forward_pass_is_not_made_twice(
    foreign_module, batches_of, loader_of, trainer_with
):
    class Module(foreign_module):
        calls = 0

        def forward(self, input_ids):
            raise AssertionError("evaluate_batch knows already")

        def evaluate_batch(self, batch):
            type(self).calls += 1
            return SimpleNamespace(nll_sum=torch.tensor(6.0), num_tokens=torch.tensor(4))

    metrics = validate(trainer_with(Perplexity()), Module(), batches_of(RAGGED), loader_of)
    assert metrics == {"val/loss": 1.5, "val/perplexity": pytest.approx(math.exp(1.5))}
    assert Module.calls == len(RAGGED)


def test_no_forward_pass_where_the_step_returned_sums(foreign_module, batches_of, loader_of, trainer_with):
    class Module(foreign_module):
        def forward(self, input_ids):
            raise AssertionError("the sums are there")

        def validation_step(self, batch, batch_idx):
            return {"nll_sum": torch.tensor(3.0), "num_tokens": torch.tensor(2)}

    assert validate(trainer_with(Perplexity()), Module(), batches_of(RAGGED), loader_of)["val/loss"] == 1.5


def test_uniform_bytes_cost_eight_bits(foreign_module, batches_of, loader_of, trainer_with, tokenizer):
    class Uniform(foreign_module):
        def forward(self, input_ids):
            return torch.zeros(*input_ids.shape, 256)

    batches = batches_of(RAGGED, vocab_size=255)
    metrics = validate(trainer_with(Perplexity(tokenizer)), Uniform(), batches, loader_of)
    assert metrics["val/bits_per_byte"] == pytest.approx(8.0, rel=1e-7)
    assert metrics["val/perplexity"] == pytest.approx(256.0, rel=1e-6)


def test_huge_logits(foreign_module, batches_of, loader_of, trainer_with):
    """A right guess at a gap of 2e4 costs nothing, a wrong one 2e4 nats, where torchmetrics gives infinity."""

    class Certain(foreign_module):
        def forward(self, input_ids):
            following = torch.roll(input_ids, -1, dims=1)
            wrong = input_ids[:, :1] % 2 == 0
            logits = torch.full((*input_ids.shape, 256), -1e4)
            return logits.scatter(2, torch.where(wrong, (following + 1) % 256, following)[..., None], 1e4)

    batches = batches_of([(8, 12)], ignored=0.0)
    (batch,) = batches
    wrong = (batch["input_ids"][:, 0] % 2 == 0).double().mean()
    metrics = validate(trainer_with(Perplexity()), Certain(), batches, loader_of)
    assert 0 < wrong < 1
    assert metrics["val/loss"] == pytest.approx(2e4 * float(wrong), rel=RELATIVE)
    assert metrics["val/perplexity"] == math.inf


def test_close_logits_far_from_zero(foreign_module, batches_of, loader_of, trainer_with):
    class Far(foreign_module):
        def forward(self, input_ids):
            return torch.tensor([1e4, 1e4 - 1]).expand(*input_ids.shape, 2)

    batches = [{"input_ids": torch.zeros(2, 5, dtype=torch.int64)}]
    expected = math.log1p(math.exp(-1.0))
    assert validate(trainer_with(Perplexity()), Far(), batches, loader_of)["val/loss"] == pytest.approx(
        expected, rel=1e-6
    )


def test_bfloat16_logits_are_summed_in_float(foreign_module, batches_of, loader_of, trainer_with):
    class Rounded(foreign_module):
        def validation_step(self, batch, batch_idx):
            return {"logits": 8 * self(batch["input_ids"]).bfloat16()}

    module, batches = Rounded(), batches_of(RAGGED)
    with torch.no_grad():
        module.eval()
        rounded = [(8 * module(b["input_ids"]).bfloat16()).double().log_softmax(-1)[:, :-1] for b in batches]
    targets = [b["labels"][:, 1:] for b in batches]
    losses = [
        -logp.gather(2, t.clamp(min=0)[..., None]).squeeze(2)[t != -100]
        for logp, t in zip(rounded, targets, strict=True)
    ]
    expected = float(torch.cat(losses).mean())
    assert validate(trainer_with(Perplexity()), module, batches, loader_of)["val/loss"] == pytest.approx(
        expected, rel=1e-6
    )


def test_ignored_rows_weigh_nothing_even_if_their_logits_are_nan(foreign_module, batches_of, loader_of, trainer_with):
    class Padded(foreign_module):
        def forward(self, input_ids):
            logits = super().forward(input_ids)
            return torch.where((input_ids == 0).all(1)[:, None, None], torch.nan, logits)

    module, batches = Padded(), batches_of(RAGGED)
    nll, count = oracle(module, batches)
    for batch in batches:
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.zeros_like(batch["input_ids"][:1])])
        batch["labels"] = torch.cat([batch["labels"], torch.full_like(batch["labels"][:1], -100)])
    metrics = validate(trainer_with(Perplexity()), module, batches, loader_of)
    assert metrics["val/loss"] == pytest.approx(nll / count, rel=RELATIVE)


def test_nothing_is_logged_where_nothing_is_a_target(foreign_module, batches_of, loader_of, trainer_with):
    batches = batches_of(RAGGED, ignored=1.1)
    with pytest.warns(UserWarning, match="Not one token"):
        metrics = validate(trainer_with(Perplexity()), foreign_module(), batches, loader_of)
    assert metrics == {}


def test_batches_without_labels_take_every_token_but_padding(foreign_module, batches_of, loader_of, trainer_with):
    module = foreign_module()
    batches = batches_of([(3, 9)], ignored=0.0)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    labelled = [{"input_ids": batches[0]["input_ids"], "labels": batches[0]["labels"].masked_fill(mask == 0, -100)}]
    batches = [{"input_ids": batches[0]["input_ids"], "attention_mask": mask}]
    nll, count = oracle(module, labelled)
    metrics = validate(trainer_with(Perplexity()), module, batches, loader_of)
    assert metrics["val/loss"] == pytest.approx(nll / count, rel=RELATIVE)


def test_several_loaders_are_logged_together_and_one_by_one(foreign_module, batches_of, loader_of, trainer_with):
    class Module(foreign_module):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None

    module, first, second = Module(), batches_of(RAGGED), batches_of([(2, 40)], seed=1)
    trainer = trainer_with(Perplexity())
    trainer.validate(module, [loader_of(first), loader_of(second)], verbose=False)
    metrics = trainer.callback_metrics
    sums = oracle(module, first), oracle(module, second)
    assert metrics["val/loss/dataloader_idx_0"] == pytest.approx(sums[0][0] / sums[0][1], rel=RELATIVE)
    assert metrics["val/loss/dataloader_idx_1"] == pytest.approx(sums[1][0] / sums[1][1], rel=RELATIVE)
    together = (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1])
    assert metrics["val/loss"] == pytest.approx(together, rel=RELATIVE)


def test_trainer_test_has_its_own_names_and_the_datamodule_its_tokenizer(
    foreign_module, batches_of, loader_of, trainer_with, tokenizer
):
    class Data(LightningDataModule):
        def __init__(self):
            super().__init__()
            self.tokenizer = tokenizer

        def test_dataloader(self):
            return loader_of(batches_of(RAGGED))

    (metrics,) = trainer_with(Perplexity()).test(foreign_module(), Data(), verbose=False)
    assert set(metrics) == {"test/loss", "test/perplexity", "test/bits_per_byte"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_logs_what_checkpoints_monitor(precision, foreign_module, batches_of, loader_of, trainer_with, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    trainer = trainer_with(Perplexity(), keep, max_epochs=2, enable_checkpointing=True, precision=precision)
    loader = loader_of(batches_of(RAGGED))
    trainer.fit(foreign_module(), loader, loader)
    assert keep.best_model_score == trainer.callback_metrics["val/loss"]


def test_clear_errors(foreign_module, batches_of, loader_of, trainer_with):
    class NoLogits(foreign_module):
        def forward(self, input_ids):
            return input_ids.float()

    class WrongShape(foreign_module):
        def validation_step(self, batch, batch_idx):
            return {"logits": torch.zeros(1, 3, 256)}

    batches = batches_of([(2, 9)])
    with pytest.raises(ConfigurationError, match="not logits"):
        validate(trainer_with(Perplexity()), NoLogits(), batches, loader_of)
    with pytest.raises(ConfigurationError, match="do not fit"):
        validate(trainer_with(Perplexity()), WrongShape(), batches, loader_of)
    with pytest.raises(ConfigurationError, match="input_ids"):
        validate(trainer_with(Perplexity()), foreign_module(), [torch.zeros(2, 9, dtype=torch.int64)], loader_of)
    with pytest.raises(ConfigurationError, match="token_byte_lengths"):
        validate(trainer_with(Perplexity(tokenizer=object())), foreign_module(), batches, loader_of)


def test_two_ranks_with_uneven_ragged_data(foreign_module, batches_of, loader_of, trainer_with, tokenizer):
    """Rank 0 has five batches, rank 1 one: a collective call per batch would wait for ever."""
    mine = {0: batches_of(RAGGED), 1: batches_of([(7, 3)], seed=1)}

    class Module(foreign_module):
        def val_dataloader(self):
            return loader_of(mine[self.global_rank])

    module = Module()
    trainer = trainer_with(Perplexity(tokenizer), devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    (metrics,) = trainer.validate(module, verbose=False)
    everything = mine[0] + mine[1]
    nll, count = oracle(module, everything)
    assert metrics["val/loss"] == pytest.approx(nll / count, rel=RELATIVE)
    assert metrics["val/bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes(everything), rel=RELATIVE)
