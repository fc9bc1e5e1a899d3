"""From text to rows of tokens: sources, the token store, packing, and endless rows in a reproducible order."""

from lightning_lm.data.objectives import (
    UL2,
    Denoiser,
    Denoisers,
    FillInTheMiddle,
    MaskedLM,
    MaskedSpans,
    MaskedStream,
    MaskedUnits,
    PrefixLM,
    PrefixStream,
    SingleTokens,
    SourceTargetStream,
    SpanCorruption,
    Vocabulary,
    WholeWords,
)
from lightning_lm.data.packing import BestFit, Concatenate, OnePerRow, Packing, RowPlan, WholeFit
from lightning_lm.data.post_training.chat import ChatML, ChatTemplate, Plain, Rendered, begin_ids, encode_pair
from lightning_lm.data.post_training.curriculum import Curriculum
from lightning_lm.data.post_training.documented_functions import DocumentedFunctions
from lightning_lm.data.post_training.environment import EnvironmentPrompts
from lightning_lm.data.post_training.examples import (
    Examples,
    ExampleSource,
    HeldOutExamples,
    PromptedExamples,
    as_examples,
    split_sides,
    texts_of,
)
from lightning_lm.data.post_training.forms import Alpaca, Columns, RecordForm, ShareGPT, form_of
from lightning_lm.data.post_training.implicit_prompts import split_preference
from lightning_lm.data.post_training.preference import (
    EncodedPair,
    PairCounts,
    PairRows,
    PairStream,
    PreferencePairs,
    encode_preference,
)
from lightning_lm.data.post_training.reasoning_gym import ReasoningGym
from lightning_lm.data.post_training.supervised import (
    ExampleCounts,
    SupervisedRows,
    SupervisedStore,
    encode_example,
    store_examples,
)
from lightning_lm.data.post_training.tasks import ReverseDigits
from lightning_lm.data.post_training.tokenizer_template import TokenizerTemplate
from lightning_lm.data.sources import Files, Mixture, Source, Texts, as_source
from lightning_lm.data.split import Split, hold_out
from lightning_lm.data.standard_library import StandardLibrary
from lightning_lm.data.store import TokenStore
from lightning_lm.data.stream import TokenStream
from lightning_lm.data.tokenize import tokenize
from lightning_lm.data.tokens import TokenFiles, write_store

__all__ = [
    "UL2",
    "Alpaca",
    "BestFit",
    "ChatML",
    "ChatTemplate",
    "Columns",
    "Concatenate",
    "Curriculum",
    "Denoiser",
    "Denoisers",
    "DocumentedFunctions",
    "EncodedPair",
    "EnvironmentPrompts",
    "ExampleCounts",
    "ExampleSource",
    "Examples",
    "Files",
    "FillInTheMiddle",
    "HeldOutExamples",
    "MaskedLM",
    "MaskedSpans",
    "MaskedStream",
    "MaskedUnits",
    "Mixture",
    "OnePerRow",
    "Packing",
    "PairCounts",
    "PairRows",
    "PairStream",
    "Plain",
    "PreferencePairs",
    "PrefixLM",
    "PrefixStream",
    "PromptedExamples",
    "ReasoningGym",
    "RecordForm",
    "Rendered",
    "ReverseDigits",
    "RowPlan",
    "ShareGPT",
    "SingleTokens",
    "Source",
    "SourceTargetStream",
    "SpanCorruption",
    "Split",
    "StandardLibrary",
    "SupervisedRows",
    "SupervisedStore",
    "Texts",
    "TokenFiles",
    "TokenStore",
    "TokenStream",
    "TokenizerTemplate",
    "Vocabulary",
    "WholeFit",
    "WholeWords",
    "as_examples",
    "as_source",
    "begin_ids",
    "encode_example",
    "encode_pair",
    "encode_preference",
    "form_of",
    "hold_out",
    "split_preference",
    "split_sides",
    "store_examples",
    "texts_of",
    "tokenize",
    "write_store",
]
