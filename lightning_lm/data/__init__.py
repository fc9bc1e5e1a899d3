"""From text to rows of tokens: sources, the token store, packing, and endless rows in a reproducible order."""

from lightning_lm.data.chat import ChatML, ChatTemplate, Plain, Rendered, TokenizerTemplate, begin_ids, encode_pair
from lightning_lm.data.examples import Examples, ExampleSource, as_examples, form_of, split_preference
from lightning_lm.data.packing import BestFit, Concatenate, OnePerRow, Packing, RowPlan
from lightning_lm.data.sources import Files, Mixture, Source, Texts, as_source
from lightning_lm.data.split import Split, hold_out
from lightning_lm.data.standard_library import StandardLibrary
from lightning_lm.data.store import TokenStore
from lightning_lm.data.stream import TokenStream
from lightning_lm.data.tasks import ReverseDigits
from lightning_lm.data.tokenize import tokenize

__all__ = [
    "BestFit",
    "ChatML",
    "ChatTemplate",
    "Concatenate",
    "ExampleSource",
    "Examples",
    "Files",
    "Mixture",
    "OnePerRow",
    "Packing",
    "Plain",
    "Rendered",
    "ReverseDigits",
    "RowPlan",
    "Source",
    "Split",
    "StandardLibrary",
    "Texts",
    "TokenStore",
    "TokenStream",
    "TokenizerTemplate",
    "as_examples",
    "as_source",
    "begin_ids",
    "encode_pair",
    "form_of",
    "hold_out",
    "split_preference",
    "tokenize",
]
