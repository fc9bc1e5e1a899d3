"""From the raw web to clean, deduplicated text, with a report of what was removed and why."""

from lightning_lm.curation.document import Document, Removed, as_document, as_documents, document_id
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
    "CorpusStep",
    "Document",
    "Filter",
    "PartitionedStep",
    "Removed",
    "Step",
    "apply_corpus_step",
    "as_document",
    "as_documents",
    "check_bounds",
    "document_id",
]
