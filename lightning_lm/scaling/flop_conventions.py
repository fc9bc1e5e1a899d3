"""Parameter counts in the conventions of the literature. The choice alone moves exponents from 0.37 to 0.70."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_lm.errors import ConfigurationError
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN

if TYPE_CHECKING:
    from torch import nn

    from lightning_lm.models.config import ModelConfig

__all__ = ["CONVENTIONS", "ModelCost", "check_convention", "measure_cost"]

CONVENTIONS: Mapping[str, str] = {
    "non_embedding": "6 FLOPs for each parameter but embeddings and head (Kaplan et al. 2020, C = 6ND)",
    "kaplan": "the same, and attention to half of the context (Kaplan et al. 2020, table 1)",
    "total": "6 FLOPs for every parameter (6ND with all parameters)",
    "palm": "the same, and attention to the whole context (Chowdhery et al. 2022, appendix B)",
    "chinchilla": "every product, softmax, and embeddings as a product (Hoffmann et al. 2022, appendix F)",
    "products": "every matrix product that is made: the head counts, the look-up of an embedding does not",
}
"""Training FLOPs per token by name. Divided by six each is a size for which ``C = 6ND`` holds exactly.

Source:
    Sizes by FLOPs: DeepSeek-AI 2024, arXiv:2401.02954, section 3.2.
"""

_FORWARD_AND_BACKWARD = 3.0


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """The parameters of a model, and its training FLOPs per token in every convention.

    Args:
        parameters: ``total``, ``embedding`` (of tokens and positions), ``head`` (0 where it is tied) and
            ``non_embedding``, which is the rest.
        flops_per_token: By convention.
    """

    parameters: Mapping[str, int]
    flops_per_token: Mapping[str, float]

    def size(self, convention: str) -> float:
        """Return the size of the model as a number of parameters in a convention: its FLOPs per token over six.

        Args:
            convention: A key of `CONVENTIONS`.
        """
        return self.flops_per_token[check_convention(convention)] / FLOPS_PER_PARAMETER_TOKEN


def measure_cost(model: "nn.Module | ModelConfig", context_length: int) -> ModelCost:
    """Return parameters and FLOPs of a model in every convention.

    Args:
        model: A model, ours or another library's, or a config whose ``vocab_size`` is set.
        context_length: Tokens of a row; decides the fraction of attention FLOPs.
    """
    import torch  # only here: fits and plans of runs that were made need none
    from torch import nn

    from lightning_lm.models.config import ModelConfig
    from lightning_lm.models.summary import attention_shapes, flops_per_token, parameter_table

    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = model.build()
    rows = {row.role: row.parameters for row in parameter_table(model)}
    total, embedding, head = sum(rows.values()), rows.get("embedding", 0), rows.get("head", 0)
    inner = total - embedding - head
    shapes = attention_shapes(model)
    scores = sum(2.0 * shape.width * context_length for shape in shapes)
    products = flops_per_token(model, context_length)
    softmax = sum(3.0 * shape.num_heads * shape.keys(context_length) for shape in shapes)
    looked_up = 2.0 * max((m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)), default=embedding)
    six = FLOPS_PER_PARAMETER_TOKEN
    flops = {
        "non_embedding": six * inner,
        "kaplan": six * inner + _FORWARD_AND_BACKWARD * scores,
        "total": six * total,
        "palm": six * total + _FORWARD_AND_BACKWARD * 2 * scores,
        "chinchilla": products + _FORWARD_AND_BACKWARD * (softmax + looked_up),
        "products": products,
    }
    parameters = {"total": total, "embedding": embedding, "head": head, "non_embedding": inner}
    return ModelCost(parameters=parameters, flops_per_token=flops)


def check_convention(convention: str) -> str:
    """Return the name of a convention.

    Args:
        convention: A key of `CONVENTIONS`.

    Raises:
        ConfigurationError: If there is none of that name.
    """
    if convention not in CONVENTIONS:
        raise ConfigurationError(f"No convention is called {convention!r}; there are {', '.join(CONVENTIONS)}.")
    return convention
