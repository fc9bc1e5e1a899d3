"""The families of ``transformers`` that our parts can express: their ``config.json`` in both directions.

A family is written by reading the parts, and the result is trusted only if reading it back gives the same model. What a
family cannot say is found that way, with its name, and never lost in silence.
"""

from lightning_lm.models.huggingface.families.bert import BERT, MODERNBERT
from lightning_lm.models.huggingface.families.deepseek_v3 import DEEPSEEK_V3
from lightning_lm.models.huggingface.families.experts import EXPERT_FAMILIES
from lightning_lm.models.huggingface.families.family import Family
from lightning_lm.models.huggingface.families.fused import GLM4, PHI3
from lightning_lm.models.huggingface.families.gemma3 import GEMMA3
from lightning_lm.models.huggingface.families.gpt2 import GPT2
from lightning_lm.models.huggingface.families.gpt_oss import GPT_OSS
from lightning_lm.models.huggingface.families.granite import GRANITE
from lightning_lm.models.huggingface.families.llama import LLAMA_FAMILIES
from lightning_lm.models.huggingface.families.mamba2 import MAMBA2
from lightning_lm.models.huggingface.families.olmo import OLMO_FAMILIES
from lightning_lm.models.huggingface.families.qwen3_next import QWEN3_NEXT
from lightning_lm.models.huggingface.families.smollm3 import SMOLLM3
from lightning_lm.models.huggingface.families.t5 import T5

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {
    **LLAMA_FAMILIES,
    "smollm3": SMOLLM3,
    "phi3": PHI3,
    "glm4": GLM4,
    "granite": GRANITE,
    "gemma3_text": GEMMA3,
    **OLMO_FAMILIES,
    **EXPERT_FAMILIES,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
    "gpt2": GPT2,
    "mamba2": MAMBA2,
    "qwen3_next": QWEN3_NEXT,
    "bert": BERT,
    "modernbert": MODERNBERT,
    "t5": T5,
}
"""By ``model_type``, the plainest first: a config is exported as the first family that can express it."""
