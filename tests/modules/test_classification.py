"""Classifiers of texts: metrics, calibration, and the step of curation that uses a trained one."""

import types

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_lm.curation import Classify, KeepAbove, ParetoKeep, Removed, TextClassifier, as_document, ngram_batch
from lightning_lm.curation.ngram_features import ngram_features
from lightning_lm.datamodules import QualityDataModule
from lightning_lm.errors import CheckpointError, ConfigurationError, DataError
from lightning_lm.models import NgramClassifier
from lightning_lm.modules import ClassificationModule, fit_temperature

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def texts(words: str, count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice((words + " shared by both").split(), 12)) + f" {seed}{i}" for i in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier after a few epochs, with the path of its checkpoint."""
    torch.manual_seed(0)
    data = QualityDataModule(
        texts("clear careful prose", 60, 1), texts("cheap watches now", 60, 2), validation=0.3, batch_size=16
    )
    module = ClassificationModule(NgramClassifier(buckets=512, d_model=4))
    trainer = Trainer(max_epochs=6, num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, datamodule=data)
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    trainer.save_checkpoint(path)
    return module, trainer, data, path


def test_metrics_are_those_of_the_validation_texts(trained):
    module, trainer, data, _ = trained
    logits, labels = [], []
    with torch.no_grad():
        for batch in data.val_dataloader():
            labels.append(batch.pop("labels"))
            logits.append(module.eval()(**batch))
    scores, labels = (torch.cat(logits) / module.temperature).softmax(-1)[:, 1].numpy(), torch.cat(labels).numpy()
    chosen = scores > 0.5
    hits = (chosen & (labels == 1)).sum()
    precision, recall = hits / max(chosen.sum(), 1), hits / (labels == 1).sum()
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    found = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert found["val/accuracy"] == pytest.approx((chosen == labels).mean(), abs=1e-6)
    assert found["val/precision"] == pytest.approx(precision, abs=1e-6)
    assert found["val/recall"] == pytest.approx(recall, abs=1e-6)
    assert found["val/f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    assert found["val/auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-5)
    assert found["val/auc"] > 0.95
    assert 0 <= found["val/calibration_error"] < 0.5


def test_the_step_scores_documents_as_the_module_does(trained):
    module, _, _, path = trained
    good, other = as_document("clear careful prose, clear prose"), as_document("cheap watches now now")
    for document in (good, other, as_document("")):
        batch = ngram_batch([ngram_features(document.text, 2)])
        with torch.no_grad():
            expected = float((module.eval()(**batch)[0] / module.temperature).softmax(-1)[1])
        scored = Classify(str(path), keep=None)(document)
        assert scored.metadata["quality_score"] == pytest.approx(expected, abs=1e-4)
    assert Classify(str(path))(good).text == good.text
    removed = Classify(str(path), keep=KeepAbove(minimum=0.9))(other)
    assert (removed.rule, removed.limit) == ("quality_score", 0.9)
    assert isinstance(Classify(str(path), label="other")(good), Removed)
    with pytest.raises(ConfigurationError, match=r"label='best' must be one of other, good"):
        Classify(str(path), label="best")(good)
    assert sum(TextClassifier.load(path).probabilities("any text").values()) == pytest.approx(1)


def test_what_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="There is no classifier at"):
        Classify(str(tmp_path / "none.ckpt"))(as_document("x"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="has no classifier of n-grams"):
        TextClassifier.load(tmp_path / "other.ckpt")


def test_paretos_rule_keeps_as_many_as_numpy_draws():
    rule, draw = ParetoKeep(alpha=3.0), np.random.default_rng(0)
    limits = np.array([rule.limit(f"{number:032x}") for number in range(4000)])
    for score in (0.1, 0.5, 0.9):
        assert (score >= limits).mean() == pytest.approx((draw.pareto(3.0, 100_000) > 1 - score).mean(), abs=0.03)
    assert rule.limit("a") == rule.limit("a") != ParetoKeep(alpha=3.0, seed=1).limit("a")


def test_the_temperature_is_that_of_a_fine_grid():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 3, generator=draw)
    labels = torch.distributions.Categorical(logits=logits).sample()
    grid = torch.logspace(-1, 1, 4001)
    losses = torch.stack([nn.functional.cross_entropy(4 * logits / value, labels) for value in grid])
    assert fit_temperature(4 * logits, labels) == pytest.approx(float(grid[losses.argmin()]), rel=2e-3)
    assert fit_temperature(torch.tensor([[1000.0, -1000.0]]), torch.tensor([0])) == pytest.approx(0.01, rel=0.1)


def test_any_model_with_logits_trains_and_class_weights_count():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, inputs):
            return types.SimpleNamespace(logits=self.head(inputs))

    module = ClassificationModule(Model(), labels=("a", "b", "c"), class_weights=(1.0, 2.0, 3.0))
    batch = {"inputs": torch.randn(8, 2), "labels": torch.arange(8) % 3}
    module.log = lambda *_, **__: None
    logp = module.model(batch["inputs"]).logits.log_softmax(-1)[torch.arange(8), batch["labels"]]
    weights = torch.tensor([1.0, 2.0, 3.0])[batch["labels"]]
    torch.testing.assert_close(module.training_step(batch, 0), -(weights * logp).sum() / weights.sum())
    del module.log
    loader = torch.utils.data.DataLoader([{"inputs": torch.randn(2), "labels": n % 3} for n in range(12)], 4)
    trainer = Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, loader, loader)
    assert 0 <= float(trainer.logged_metrics["val/auc"]) <= 1


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigurationError, match="one class weight for each"):
        ClassificationModule(labels=("a", "b"), class_weights=(1.0,))
    with pytest.raises(ConfigurationError, match="buckets=0"):
        NgramClassifier(buckets=0)
    with pytest.raises(ConfigurationError, match="validation=1"):
        QualityDataModule(["a"], ["b"], validation=1.0)
    with pytest.raises(DataError, match="0 good and 1 other"):
        QualityDataModule([], ["b"], validation=0).setup()


def test_the_mean_of_embeddings_is_that_of_a_loop():
    model = NgramClassifier(3, buckets=7, d_model=4, max_ngram=3)
    nn.init.normal_(model.head.weight)
    features = [ngram_features(text, 3) for text in ("one two three four", "", "two two")]
    assert [len(values) for values in features] == [4 + 3 + 2, 0, 2 + 1]
    logits = model(**ngram_batch(features))
    for row, values in zip(logits, features, strict=True):
        rows = model.embedding.weight[torch.from_numpy(values) % 7]
        mean = rows.mean(0) if len(values) else torch.zeros(4)
        torch.testing.assert_close(row, model.head(mean))
