"""Text from a trained model: ``Generator(model, tokenizer).generate(prompts, sampling=Sampling(top_p=0.9))``."""

from lightning_lm.generation.batch import FinishReason
from lightning_lm.generation.generator import Completion, Generator
from lightning_lm.generation.sampling import Sampling

__all__ = ["Completion", "FinishReason", "Generator", "Sampling"]
