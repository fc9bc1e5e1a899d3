"""Mixtures of experts: routers, balancing, stacks of experts, and the layer made of them."""

from lightning_lm.models.experts.balance import Balance, LaggedLoss, LoadBias, SequenceLoss
from lightning_lm.models.experts.moe import MixtureOfExperts, MoE
from lightning_lm.models.experts.routers import Groups, HashRouter, Router, TopK

__all__ = [
    "Balance",
    "Groups",
    "HashRouter",
    "LaggedLoss",
    "LoadBias",
    "MixtureOfExperts",
    "MoE",
    "Router",
    "SequenceLoss",
    "TopK",
]
