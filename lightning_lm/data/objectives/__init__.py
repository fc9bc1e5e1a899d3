"""Training objectives as parts of the data: hidden tokens, removed spans, prefixes, reordered texts."""

from lightning_lm.data.objectives.denoising import UL2, Denoiser, Denoisers, FillInTheMiddle, PrefixLM, SpanCorruption
from lightning_lm.data.objectives.masked import MaskedLM, MaskedSpans, MaskedUnits, SingleTokens, WholeWords
from lightning_lm.data.objectives.streams import MaskedStream, PrefixStream, SourceTargetStream
from lightning_lm.data.objectives.vocabulary import MASK, SENTINELS, Vocabulary

__all__ = [
    "MASK",
    "SENTINELS",
    "UL2",
    "Denoiser",
    "Denoisers",
    "FillInTheMiddle",
    "MaskedLM",
    "MaskedSpans",
    "MaskedStream",
    "MaskedUnits",
    "PrefixLM",
    "PrefixStream",
    "SingleTokens",
    "SourceTargetStream",
    "SpanCorruption",
    "Vocabulary",
    "WholeWords",
]
