"""From the raw web to clean, deduplicated text, with a report of what was removed and why."""

from lightning_lm.curation.bloom import BloomFilter, KnownTexts
from lightning_lm.curation.c4 import C4Lines, C4Quality, c4_lines
from lightning_lm.curation.classify import Classify, KeepAbove, ParetoKeep, ScoreRule, TextClassifier
from lightning_lm.curation.decontaminate import Contamination, Decontaminate, EvaluationIndex
from lightning_lm.curation.document import Document, Removed, as_document, as_documents, document_id
from lightning_lm.curation.duplicate_lines import DuplicateLines
from lightning_lm.curation.exact_duplicates import ExactDuplicates
from lightning_lm.curation.extraction import Extract, ExtractMarkdown, ExtractPrecise
from lightning_lm.curation.fineweb import FineWebQuality, fineweb_quality
from lightning_lm.curation.gopher_quality import GopherQuality, gopher_quality
from lightning_lm.curation.gopher_repetition import GopherRepetition, gopher_repetition
from lightning_lm.curation.importance_resampling import ImportanceResampling
from lightning_lm.curation.keep import KeepHighest, KeepLongest, KeepRule, KeepShortest
from lightning_lm.curation.language import Language, identify_language
from lightning_lm.curation.near_duplicates import NearDuplicates
from lightning_lm.curation.ngram_features import ngram_batch, ngram_features
from lightning_lm.curation.normalize import NormalizeText, normalize_text
from lightning_lm.curation.pii import CardNumbers, Emails, Expression, IPAddresses, MaskPII, PhoneNumbers, PIIKind
from lightning_lm.curation.pipeline import Pipeline
from lightning_lm.curation.reading import Reading, Unreadable
from lightning_lm.curation.report import Report
from lightning_lm.curation.selection import DomainCap, SourceSampling, TokenBudget, domain_of
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
from lightning_lm.curation.word_list import WordList, count_listed

__all__ = [
    "Arrays",
    "BloomFilter",
    "Bounds",
    "C4Lines",
    "C4Quality",
    "CardNumbers",
    "Classify",
    "Contamination",
    "CorpusStep",
    "Decontaminate",
    "Document",
    "DomainCap",
    "DuplicateLines",
    "Emails",
    "EvaluationIndex",
    "ExactDuplicates",
    "Expression",
    "Extract",
    "ExtractMarkdown",
    "ExtractPrecise",
    "Filter",
    "FineWebQuality",
    "GopherQuality",
    "GopherRepetition",
    "IPAddresses",
    "ImportanceResampling",
    "KeepAbove",
    "KeepHighest",
    "KeepLongest",
    "KeepRule",
    "KeepShortest",
    "KnownTexts",
    "Language",
    "MaskPII",
    "NearDuplicates",
    "NormalizeText",
    "PIIKind",
    "ParetoKeep",
    "PartitionedStep",
    "PhoneNumbers",
    "Pipeline",
    "Reading",
    "Removed",
    "Report",
    "ScoreRule",
    "SourceSampling",
    "Step",
    "TextClassifier",
    "TokenBudget",
    "Unreadable",
    "WordList",
    "apply_corpus_step",
    "as_document",
    "as_documents",
    "c4_lines",
    "check_bounds",
    "count_listed",
    "document_id",
    "domain_of",
    "fineweb_quality",
    "gopher_quality",
    "gopher_repetition",
    "identify_language",
    "ngram_batch",
    "ngram_features",
    "normalize_text",
]
