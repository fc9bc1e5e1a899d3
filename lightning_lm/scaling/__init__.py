"""Scaling laws: what runs were made, what they say about larger ones, and what to train next."""

from lightning_lm.scaling.anneal import AnnealingFit, AnnealingRun, fit_annealing
from lightning_lm.scaling.diagnostics import Finding
from lightning_lm.scaling.envelope import fit_envelope
from lightning_lm.scaling.fit import Estimate, Optimum, ScalingFit
from lightning_lm.scaling.flops import CONVENTIONS, ModelCost, check_convention, measure_cost
from lightning_lm.scaling.frontier import FrontierLaw
from lightning_lm.scaling.holdout import HeldOut, hold_out
from lightning_lm.scaling.inference import InferenceOptimum, optimal_with_inference
from lightning_lm.scaling.isoflop import IsoFlop, Parabola, fit_isoflop, parabolas
from lightning_lm.scaling.laws import ChinchillaLaw, DataConstrainedLaw, KaplanLaw, Law
from lightning_lm.scaling.outliers import DropHighestLosses, DropSmallestBudgets, KeepAll, Outliers
from lightning_lm.scaling.parametric import Estimator, fit_data_constrained, fit_kaplan, fit_parametric
from lightning_lm.scaling.points import Curve, Points
from lightning_lm.scaling.profile import profile_interval

__all__ = [
    "CONVENTIONS",
    "AnnealingFit",
    "AnnealingRun",
    "ChinchillaLaw",
    "Curve",
    "DataConstrainedLaw",
    "DropHighestLosses",
    "DropSmallestBudgets",
    "Estimate",
    "Estimator",
    "Finding",
    "FrontierLaw",
    "HeldOut",
    "InferenceOptimum",
    "IsoFlop",
    "KaplanLaw",
    "KeepAll",
    "Law",
    "ModelCost",
    "Optimum",
    "Outliers",
    "Parabola",
    "Points",
    "ScalingFit",
    "check_convention",
    "fit_annealing",
    "fit_data_constrained",
    "fit_envelope",
    "fit_isoflop",
    "fit_kaplan",
    "fit_parametric",
    "hold_out",
    "measure_cost",
    "optimal_with_inference",
    "parabolas",
    "profile_interval",
]
