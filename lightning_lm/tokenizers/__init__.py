"""Text to token ids and back.

Byte-level BPE that is trained here, SentencePiece, bytes, characters, words, and any ``tokenizer.json``. All meet
`lightning_lm.protocols.Tokenizer`, and `load_tokenizer` opens any of them.
"""

from lightning_lm.tokenizers.base import END_OF_TEXT, BaseTokenizer
from lightning_lm.tokenizers.bpe import BPETokenizer
from lightning_lm.tokenizers.builders import (
    Bytes,
    LoadTokenizer,
    TokenizerPart,
    TrainBPE,
    TrainCharacters,
    TrainedTokenizerPart,
    TrainSentencePiece,
    TrainWords,
)
from lightning_lm.tokenizers.loading import load_tokenizer, tokenizer_from_files
from lightning_lm.tokenizers.patterns import GPT2, GPT4, QWEN2, SplitPattern
from lightning_lm.tokenizers.pretrained import PretrainedTokenizer
from lightning_lm.tokenizers.sentencepiece import SentencePieceTokenizer
from lightning_lm.tokenizers.simple import UNKNOWN, ByteTokenizer, CharacterTokenizer, WordTokenizer

__all__ = [
    "END_OF_TEXT",
    "GPT2",
    "GPT4",
    "QWEN2",
    "UNKNOWN",
    "BPETokenizer",
    "BaseTokenizer",
    "ByteTokenizer",
    "Bytes",
    "CharacterTokenizer",
    "LoadTokenizer",
    "PretrainedTokenizer",
    "SentencePieceTokenizer",
    "SplitPattern",
    "TokenizerPart",
    "TrainBPE",
    "TrainCharacters",
    "TrainSentencePiece",
    "TrainWords",
    "TrainedTokenizerPart",
    "WordTokenizer",
    "load_tokenizer",
    "tokenizer_from_files",
]
