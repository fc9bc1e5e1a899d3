"""Text from a trained model: ``Generator(model, tokenizer).generate(prompts, sampling=Sampling(top_p=0.9))``."""

from lightning_lm.generation.backend import (
    Backend,
    GenerationBackend,
    HTTPBackend,
    OwnBackend,
    PolicyAtWork,
    TransformersBackend,
)
from lightning_lm.generation.beam import Beam, beam_search
from lightning_lm.generation.decoding_loop import FinishReason
from lightning_lm.generation.generator import Completion, Generator
from lightning_lm.generation.openai_client import HTTPGenerator
from lightning_lm.generation.sampling import Sampling
from lightning_lm.generation.sources import read_sources
from lightning_lm.generation.speculative import Speculation
from lightning_lm.generation.transformers import TransformersGenerator
from lightning_lm.generation.weight_push import WeightPush

__all__ = [
    "Backend",
    "Beam",
    "Completion",
    "FinishReason",
    "GenerationBackend",
    "Generator",
    "HTTPBackend",
    "HTTPGenerator",
    "OwnBackend",
    "PolicyAtWork",
    "Sampling",
    "Speculation",
    "TransformersBackend",
    "TransformersGenerator",
    "WeightPush",
    "beam_search",
    "read_sources",
]
