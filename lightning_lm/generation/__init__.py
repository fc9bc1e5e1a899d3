"""Text from a trained model: ``Generator(model, tokenizer).generate(prompts, sampling=Sampling(top_p=0.9))``."""

from lightning_lm.generation.backend import GenerationBackend
from lightning_lm.generation.batch import FinishReason
from lightning_lm.generation.beam import Beam, beam_search
from lightning_lm.generation.generator import Completion, Generator
from lightning_lm.generation.http import HTTPGenerator
from lightning_lm.generation.sampling import Sampling
from lightning_lm.generation.speculative import Speculation

__all__ = [
    "Beam",
    "Completion",
    "FinishReason",
    "GenerationBackend",
    "Generator",
    "HTTPGenerator",
    "Sampling",
    "Speculation",
    "beam_search",
]
