"""Training objectives as parts of the data: hidden tokens, removed spans, prefixes, reordered texts."""

from lightning_lm.data.objectives.denoising import Denoiser, Denoisers, FillInTheMiddle, Prefix, SpanCorruption, ul2
from lightning_lm.data.objectives.masked import MaskedLM, MaskedUnits, Spans, Tokens, WholeWords
from lightning_lm.data.objectives.streams import MaskedStream, PrefixStream, SourceTargetStream
from lightning_lm.data.objectives.vocabulary import MASK, SENTINELS, Vocabulary

__all__ = [
    "MASK",
    "SENTINELS",
    "Denoiser",
    "Denoisers",
    "FillInTheMiddle",
    "MaskedLM",
    "MaskedStream",
    "MaskedUnits",
    "Prefix",
    "PrefixStream",
    "SourceTargetStream",
    "SpanCorruption",
    "Spans",
    "Tokens",
    "Vocabulary",
    "WholeWords",
    "ul2",
]
