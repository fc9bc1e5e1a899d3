"""All callbacks together on this package's own module and data."""

import math

import pytest
import torch

from lightning_lm.callbacks import (
    CompressionReport,
    LMProgressBar,
    LMSummary,
    LossSpike,
    Perplexity,
    SampleText,
    Throughput,
)
from lightning_lm.datamodules import TextDataModule
from lightning_lm.datamodules.loader import Loading
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
    def fit(*callbacks, steps=6, **options):
        torch.manual_seed(0)
        data = TextDataModule(
            TEXTS,
            0.3,
            tokenizer=ByteTokenizer(),
            context_length=32,
            batch_size=4,
            loading=Loading(cache_dir=str(tmp_path), show_progress=False, tokenize_workers=1),
        )
        module = PretrainModule(CONFIG)
        defaults = {"max_epochs": -1, "max_steps": steps, "check_val_every_n_epoch": None, "val_check_interval": 3}
        trainer = trainer_with(
            *callbacks, **defaults, log_every_n_steps=2, use_distributed_sampler=False, logger=record_of(), **options
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
    }  # fmt: skip
    perf = next(m for _, m in reversed(trainer.logger.metrics) if "perf/mfu" in m)
    flops = flops_per_token(with_all.model, 32)
    assert perf["perf/mfu"] == pytest.approx(perf["perf/tokens_per_s"] * flops / 1e9)
    assert {step for _, _, step in trainer.logger.texts} == {3, 6}


def test_train_and_perf_are_logged_at_the_same_steps(run):
    trainer, _, _ = run(Throughput(), steps=8)
    steps = {name: [s for s, m in trainer.logger.metrics if name in m] for name in ("train/loss", "perf/tokens_per_s")}
    assert steps["train/loss"] == steps["perf/tokens_per_s"] == [2, 4, 6, 8]
