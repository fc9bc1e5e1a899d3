"""All callbacks together on this package's own module and data."""

import dataclasses
import math

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_lm.callbacks import (
    CompressionReport,
    LastCheckpoint,
    LMProgressBar,
    LMSummary,
    LossSpike,
    Perplexity,
    SampleText,
    Throughput,
)
from lightning_lm.datamodules import TextDataModule
from lightning_lm.datamodules.loader import Loading
from lightning_lm.errors import ConfigurationError
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.models.summary import flops_per_token
from lightning_lm.modules import PretrainModule
from lightning_lm.tokenizers import ByteTokenizer

TEXTS = [f"document {i}: " + " ".join(str(i * j) for j in range(i % 7 + 3)) for i in range(60)]
CONFIG = TransformerConfig(
    d_model=16,
    num_layers=1,
    context_length=32,
    dropout=0.1,
    layers=Layer(mixer=Attention(num_heads=2), ffn=GLU(hidden_size=32)),
)


@pytest.fixture
def run(tmp_path, trainer_with, record_of):
    def fit(*callbacks, steps=6, model=CONFIG, **options):
        torch.manual_seed(0)
        data = TextDataModule(
            TEXTS,
            0.3,
            tokenizer=ByteTokenizer(),
            context_length=32,
            batch_size=4,
            loading=Loading(cache_dir=str(tmp_path), show_progress=False, tokenize_workers=1),
        )
        module = PretrainModule(model)
        defaults = {"max_epochs": -1, "max_steps": steps, "check_val_every_n_epoch": None, "val_check_interval": 3}
        trainer = trainer_with(
            *callbacks, log_every_n_steps=2, use_distributed_sampler=False, logger=record_of(), **(defaults | options)
        )
        trainer.fit(module, datamodule=data)
        return trainer, module, data

    return fit


def test_bits_per_byte_of_the_validation_text(run):
    trainer, module, data = run(Perplexity())
    nll, bytes_, model = 0.0, 0, module.model.double().eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            logp = model(
                batch["input_ids"][:, :-1],
                position_ids=batch["position_ids"][:, :-1],
                document_ids=batch["document_ids"][:, :-1],
            ).log_softmax(-1)
            targets = batch["labels"][:, 1:]
            nll -= float(logp.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)[targets >= 0].sum())
    bytes_ = sum(len(text.encode()) for text in data.validation_texts())
    metrics = trainer.callback_metrics
    assert metrics["val/bits_per_byte"] == pytest.approx(nll / math.log(2) / bytes_, rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(metrics["val/loss"]), rel=1e-6)


def test_everything_together_leaves_the_training_as_it_was(run):
    callbacks = [
        LMSummary(),
        LMProgressBar(refresh_s=0.0),
        Perplexity(),
        Throughput(peak_flops_per_s=1e9),
        SampleText(["1 "], max_new_tokens=3),
        LossSpike(),
        CompressionReport(),
    ]
    trainer, with_all, _ = run(*callbacks, enable_progress_bar=True, enable_model_summary=True)
    _, without, _ = run()
    assert all(torch.equal(a, b) for a, b in zip(with_all.parameters(), without.parameters(), strict=True))
    names = {name for _, metrics in trainer.logger.metrics for name in metrics}
    assert names >= {
        "train/loss", "train/loss_spikes", "val/loss", "val/perplexity", "val/bits_per_byte",
        "perf/tokens_per_s", "perf/step_time_s", "perf/mfu", "perf/memory_gb",
        "report/gzip_bits_per_byte", "report/xz_bits_per_byte", "report/unigram_bits_per_byte",
        "report/ngram_bits_per_byte",
    }  # fmt: skip
    perf = next(m for _, m in reversed(trainer.logger.metrics) if "perf/mfu" in m)
    flops = flops_per_token(with_all.model, 32)
    assert perf["perf/mfu"] == pytest.approx(perf["perf/tokens_per_s"] * flops / 1e9)
    assert {step for _, _, step in trainer.logger.texts} == {3, 6}


def test_train_and_perf_are_logged_at_the_same_steps(run):
    trainer, _, _ = run(Throughput(), steps=8)
    steps = {name: [s for s, m in trainer.logger.metrics if name in m] for name in ("train/loss", "perf/tokens_per_s")}
    assert steps["train/loss"] == steps["perf/tokens_per_s"] == [2, 4, 6, 8]


class OneLayer(nn.Module):
    """A user's own model in an `LMModule`: no ``hidden``, no ``head``, no cache."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(257, 257)

    def forward(self, input_ids, **_):
        return self.table(input_ids)


def test_samples_of_a_users_own_model_begin_with_the_data(run):
    """By default the prompts are beginnings of held-out texts; the `LMModule` itself has no forward."""
    trainer, _, data = run(SampleText(max_new_tokens=3), CompressionReport(), model=OneLayer())
    assert {step for _, _, step in trainer.logger.texts} == {3, 6}
    shown = trainer.logger.texts[0][1].strip()
    assert any(shown.startswith(text[: text.rindex(" ", 0, 24)]) for text in data.validation_texts())


def test_the_command_generates_from_a_text_of_the_data(run, tmp_path, capsys):
    save = LastCheckpoint(2, tmp_path / "saved")
    run(CompressionReport(), save, enable_checkpointing=True)
    out = capsys.readouterr().out
    assert "def main(" not in out
    assert "lightning-lm generate --checkpoint" in out
    assert "--prompt 'document " in out


def test_a_run_that_is_averaged_before_its_model_is_built_is_refused(run):
    """Lightning's callback copies the module in ``setup``, when a model from a config does not exist yet."""
    swa = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    with pytest.raises(ConfigurationError, match=r"config\.build\(\)"):
        run(swa)


def test_a_built_model_is_averaged(run):
    torch.manual_seed(0)
    swa = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    _, module, _ = run(
        swa, model=dataclasses.replace(CONFIG, vocab_size=257).build(), max_epochs=1, check_val_every_n_epoch=1
    )
    assert sum(1 for _ in swa._average_model.parameters()) == sum(1 for _ in module.parameters()) > 0
