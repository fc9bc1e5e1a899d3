"""Perplexity of a model on text, measured without a Trainer."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lm.data.batches import completed
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.kernels import linear_nll, output_layer
from lightning_lm.protocols import LanguageModel, is_language_model
from lightning_lm.types import IGNORE_INDEX

__all__ = ["TextScore", "evaluate_perplexity"]


@dataclass(frozen=True)
class TextScore:
    """Score of a text, as sums: the scores of parts add up to that of the whole.

    Args:
        nll_sum: Negative log-likelihood of all target tokens. Nats.
        num_tokens: Target tokens.
        num_bytes: UTF-8 bytes of the target tokens, where these are known.
    """

    nll_sum: float
    num_tokens: int
    num_bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """The number of equally likely tokens that would be as hard to guess; infinite beyond the float range."""
        return math.exp(self.loss) if self.loss < math.log(np.finfo(np.float64).max) else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Cost of the text, comparable between tokenizers and with compressors.

        Raises:
            DataError: If the bytes are not known.
        """
        if not self.num_bytes:
            raise DataError(
                "The bytes of the text are not known; evaluate with token_bytes=tokenizer.token_byte_lengths()."
            )
        return self.nll_sum / math.log(2.0) / self.num_bytes


def evaluate_perplexity(
    model: LanguageModel, batches: Iterable[Mapping[str, Tensor]], *, token_bytes: np.ndarray | None = None
) -> TextScore:
    """Measure a model on rows of tokens, each target exactly once.

    Likelihoods are summed in float64 and tokens counted in int64, so neither the order nor the size of the batches
    matters. The model is put into evaluation mode and back.

    Args:
        model: A language model; the batches go to the device of its head.
        batches: `types.TokenBatch`, for instance a validation loader of `TextDataModule`.
        token_bytes: UTF-8 bytes that each id stands for, int [vocab]: ``tokenizer.token_byte_lengths()``.

    Raises:
        ConfigurationError: If the model does not meet the protocol.
        DataError: If no batch has a target.
    """
    if not isinstance(model, nn.Module) or not is_language_model(model):
        raise ConfigurationError(
            f"{type(model).__name__} has no hidden() and head; wrap a model of transformers in TransformersModel."
        )
    nll_sum, num_tokens, num_bytes = 0.0, 0, 0
    lengths = None if token_bytes is None else torch.from_numpy(np.asarray(token_bytes, dtype=np.int64))
    with _evaluating(model), torch.inference_mode():
        for batch in map(completed, batches):
            labels = batch["labels"][:, 1:]
            nll, count = _score(model, batch)
            nll_sum, num_tokens = nll_sum + nll, num_tokens + count
            if lengths is not None:
                num_bytes += int(lengths[labels[labels != IGNORE_INDEX].cpu()].sum())
    if num_tokens == 0:
        raise DataError("There is nothing to measure: no batch has a target. Is the text shorter than two tokens?")
    return TextScore(nll_sum, num_tokens, None if lengths is None else num_bytes)


def _score(model: LanguageModel, batch: Mapping[str, Tensor]) -> tuple[float, int]:
    """Return the negative log-likelihood of a batch's targets, in nats, and their number."""
    device = model.head.weight.device
    places = {name: batch[name][:, :-1].to(device) for name in ("position_ids", "document_ids") if name in batch}
    hidden = model.hidden(batch["input_ids"][:, :-1].to(device), **places)
    targets = batch["labels"][:, 1:].to(device)
    nll = linear_nll(hidden, targets=targets, **output_layer(model))
    return float(nll.sum(dtype=torch.float64)), int((targets != IGNORE_INDEX).sum())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
