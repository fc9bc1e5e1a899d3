"""Documents out of files: web archives, HTML, PDF, text and records, told apart by content."""

from lightning_lm.curation.reading.outcome import MEDIA_TYPE, SOURCE, Unreadable
from lightning_lm.curation.reading.reader import Reading

__all__ = ["MEDIA_TYPE", "SOURCE", "Reading", "Unreadable"]
