"""The report of a run: counts, samples and measured values of every step, as data and as a page."""

from lightning_lm.curation.report.report import Report

__all__ = ["Report"]
