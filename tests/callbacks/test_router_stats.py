"""Loads of experts: numbers that are logged and drawn, and a router that collapses."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_lm.callbacks import RouterStats
from lightning_lm.models import GLU, Attention, Layer, MoE, TopK, TransformerConfig, active_parameters, describe, render
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import SGD, Constant

PART = MoE(experts=GLU(hidden_size=8), num_experts=8, router=TopK(k=2))
CONFIG = TransformerConfig(
    vocab_size=11, d_model=8, num_layers=2, layers=Layer(mixer=Attention(num_heads=2), ffn=PART), context_length=16
)


class Seen(Logger):
    name, version = "seen", 0

    def __init__(self):
        super().__init__()
        self.metrics = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics.update(metrics)


def run(tmp_path, collapsed):
    torch.manual_seed(0)
    model, logger = CONFIG.build(), Seen()
    if collapsed:
        model.layers[1].ffn.balance.bias[:2] = 9.0
    rows = [{"input_ids": torch.randint(11, (4, 9))} for _ in range(4)]
    stats = RouterStats(tmp_path / "r.html")
    trainer = Trainer(
        accelerator="cpu", max_steps=4, log_every_n_steps=2, logger=logger, callbacks=[stats],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module = PretrainModule(model, optimizer=SGD(lr=0.0), schedule=Constant())
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
    return logger.metrics, (tmp_path / "r.html").read_text()


def test_a_collapsed_router_is_measured_drawn_and_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"router of model.layers.1.ffn collapses: .* 4.0 times .* 6 get nothing"):
        metrics, drawing = run(tmp_path, collapsed=True)
    assert metrics["moe/model.layers.1.ffn/max_load"] == pytest.approx(4.0)
    assert metrics["moe/model.layers.1.ffn/dead_experts"] == 6
    assert metrics["moe/dropped"] == metrics["moe/auxiliary_loss"] == 0
    assert 0.9 < metrics["moe/entropy"] <= 1
    assert "largest load over the mean load" in drawing
    assert "layers.1" in drawing


def test_an_even_router_is_not(tmp_path, recwarn):
    metrics, _ = run(tmp_path, collapsed=False)
    assert metrics["moe/max_load"] < 4
    assert not [warning for warning in recwarn if "collapses" in str(warning.message)]


def test_total_and_active_parameters_are_told_apart():
    model = CONFIG.build()
    inactive = 2 * 3 * 6 * 8 * 8  # layers, projections, experts that a token does not use, matrix
    total = sum(parameter.numel() for parameter in model.parameters())
    assert active_parameters(model) == total - inactive
    assert "active per token" in str(render(describe(model, 16)).title)
    dense = TransformerConfig(vocab_size=11, d_model=16, num_layers=1).build()
    assert "active" not in str(render(describe(dense, 16)).title)
