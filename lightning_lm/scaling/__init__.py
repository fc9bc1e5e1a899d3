"""Scaling laws: what runs were made, what they say about larger ones, and what to train next."""

from lightning_lm.scaling.comparison import SettingResult, compare_settings
from lightning_lm.scaling.critical_batch import CriticalBatch, NoiseMoments, fit_critical_batch, noise_moments
from lightning_lm.scaling.fits.anneal import AnnealingFit, AnnealingRun, fit_annealing
from lightning_lm.scaling.fits.diagnostics import DropHighestLosses, DropSmallestBudgets, Finding, KeepAll, Outliers
from lightning_lm.scaling.fits.envelope import fit_envelope
from lightning_lm.scaling.fits.fit import Estimate, Optimum, ScalingFit
from lightning_lm.scaling.fits.frontier import FrontierLaw
from lightning_lm.scaling.fits.holdout import FormTest, HeldOut, compare_forms, hold_out
from lightning_lm.scaling.fits.inference import InferenceOptimum, optimal_with_inference
from lightning_lm.scaling.fits.isoflop import IsoFlop, Parabola, fit_isoflop, parabolas
from lightning_lm.scaling.fits.laws import ChinchillaLaw, DataConstrainedLaw, GeneralLaw, KaplanLaw, Law
from lightning_lm.scaling.fits.parametric import (
    Estimator,
    fit_data_constrained,
    fit_general,
    fit_kaplan,
    fit_parametric,
)
from lightning_lm.scaling.fits.points import Curve, Points
from lightning_lm.scaling.fits.profile_likelihood import profile_interval
from lightning_lm.scaling.fits.task_prediction import (
    AccuracyFit,
    CostFit,
    HeldOutScore,
    fit_accuracy,
    fit_cost,
    hold_out_scores,
)
from lightning_lm.scaling.fits.task_runs import TaskRuns
from lightning_lm.scaling.flop_conventions import CONVENTIONS, ModelCost, check_convention, measure_cost
from lightning_lm.scaling.import_runs import import_runs
from lightning_lm.scaling.ledger import BadLine, RunLedger, RunRecord, curves_of, points_of
from lightning_lm.scaling.lr_transfer import RateCurve, TransferFit, fit_transfer, transfer_of
from lightning_lm.scaling.search_space import Grid, IsoFlopPlan, RandomSearch, SearchSpace
from lightning_lm.scaling.sweep import Budget, ClockMeter, FlopMeter, Meter, Outcome, Sweep, Trial
from lightning_lm.scaling.task_scores import task_runs_of, tasks_in

__all__ = [
    "CONVENTIONS",
    "AccuracyFit",
    "AnnealingFit",
    "AnnealingRun",
    "BadLine",
    "Budget",
    "ChinchillaLaw",
    "ClockMeter",
    "CostFit",
    "CriticalBatch",
    "Curve",
    "DataConstrainedLaw",
    "DropHighestLosses",
    "DropSmallestBudgets",
    "Estimate",
    "Estimator",
    "Finding",
    "FlopMeter",
    "FormTest",
    "FrontierLaw",
    "GeneralLaw",
    "Grid",
    "HeldOut",
    "HeldOutScore",
    "InferenceOptimum",
    "IsoFlop",
    "IsoFlopPlan",
    "KaplanLaw",
    "KeepAll",
    "Law",
    "Meter",
    "ModelCost",
    "NoiseMoments",
    "Optimum",
    "Outcome",
    "Outliers",
    "Parabola",
    "Points",
    "RandomSearch",
    "RateCurve",
    "RunLedger",
    "RunRecord",
    "ScalingFit",
    "SearchSpace",
    "SettingResult",
    "Sweep",
    "TaskRuns",
    "TransferFit",
    "Trial",
    "check_convention",
    "compare_forms",
    "compare_settings",
    "curves_of",
    "fit_accuracy",
    "fit_annealing",
    "fit_cost",
    "fit_critical_batch",
    "fit_data_constrained",
    "fit_envelope",
    "fit_general",
    "fit_isoflop",
    "fit_kaplan",
    "fit_parametric",
    "fit_transfer",
    "hold_out",
    "hold_out_scores",
    "import_runs",
    "measure_cost",
    "noise_moments",
    "optimal_with_inference",
    "parabolas",
    "points_of",
    "profile_interval",
    "task_runs_of",
    "tasks_in",
    "transfer_of",
]
