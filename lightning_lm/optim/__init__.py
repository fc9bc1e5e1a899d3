"""Optimizers, the routing of parameters to them, learning-rate schedules, and rules for skipping bad steps."""

from lightning_lm.optim.combined import CombinedOptimizer
from lightning_lm.optim.muon import MuonOptimizer, MuonScaling, orthogonalize
from lightning_lm.optim.mup import MuPRates
from lightning_lm.optim.optimizers import SGD, AdamW, Muon, OptimizerPart, RoledParameter
from lightning_lm.optim.schedules import WSD, Constant, Cosine, InverseSquareRoot, Linear, Schedule, ScheduledLR
from lightning_lm.optim.step_skipping import NonFinite, NormHistory, SkipRule, Spike

__all__ = [
    "SGD",
    "WSD",
    "AdamW",
    "CombinedOptimizer",
    "Constant",
    "Cosine",
    "InverseSquareRoot",
    "Linear",
    "MuPRates",
    "Muon",
    "MuonOptimizer",
    "MuonScaling",
    "NonFinite",
    "NormHistory",
    "OptimizerPart",
    "RoledParameter",
    "Schedule",
    "ScheduledLR",
    "SkipRule",
    "Spike",
    "orthogonalize",
]
