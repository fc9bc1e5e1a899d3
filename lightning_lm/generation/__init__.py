"""Text from a trained model: ``Generator(model, tokenizer).generate(prompts, sampling=Sampling(top_p=0.9))``."""

from lightning_lm.generation.batch import FinishReason
from lightning_lm.generation.beam import Beam, beam_search
from lightning_lm.generation.generator import Completion, Generator
from lightning_lm.generation.sampling import Sampling
from lightning_lm.generation.speculative import Speculation

__all__ = ["Beam", "Completion", "FinishReason", "Generator", "Sampling", "Speculation", "beam_search"]
