"""From the raw web to clean, deduplicated text, with a report of what was removed and why."""

from lightning_lm.curation.c4 import C4Lines, C4Quality, c4_lines
from lightning_lm.curation.document import Document, Removed, as_document, as_documents, document_id
from lightning_lm.curation.duplicate_lines import DuplicateLines
from lightning_lm.curation.exact_duplicates import ExactDuplicates
from lightning_lm.curation.fineweb import FineWebQuality, fineweb_quality
from lightning_lm.curation.gopher_quality import GopherQuality, gopher_quality
from lightning_lm.curation.gopher_repetition import GopherRepetition, gopher_repetition
from lightning_lm.curation.keep import KeepHighest, KeepLongest, KeepRule, KeepShortest
from lightning_lm.curation.near_duplicates import NearDuplicates
from lightning_lm.curation.step import (
    Arrays,
    Bounds,
    CorpusStep,
    Filter,
    PartitionedStep,
    Step,
    apply_corpus_step,
    check_bounds,
)

__all__ = [
    "Arrays",
    "Bounds",
    "C4Lines",
    "C4Quality",
    "CorpusStep",
    "Document",
    "DuplicateLines",
    "ExactDuplicates",
    "Filter",
    "FineWebQuality",
    "GopherQuality",
    "GopherRepetition",
    "KeepHighest",
    "KeepLongest",
    "KeepRule",
    "KeepShortest",
    "NearDuplicates",
    "PartitionedStep",
    "Removed",
    "Step",
    "apply_corpus_step",
    "as_document",
    "as_documents",
    "c4_lines",
    "check_bounds",
    "document_id",
    "fineweb_quality",
    "gopher_quality",
    "gopher_repetition",
]
