"""Kahneman-Tversky optimization: training on single completions that are known to be good or bad, without pairs.

Each completion is compared with the KL estimate of its optimizer step: how far the policy has moved, on average, on
prompts with completions of other prompts. Unlike in TRL the estimate is that of the whole step, over all ranks and
micro-batches, so the gradient does not depend on how the step is cut.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lm._lightning import trainer_of
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.preference import KTO
from lightning_lm.models import ModelConfig
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.base import Compile
from lightning_lm.modules.preference.compared import ComparedModule
from lightning_lm.modules.preference.pairs import completion_lengths, sum_over_pairs
from lightning_lm.modules.preference.reference import CopyReference, Reference, completion_logprobs
from lightning_lm.modules.token_losses import token_scores
from lightning_lm.optim import AdamW, Cosine, OptimizerPart, Schedule, SkipRule
from lightning_lm.types import UnpairedBatch

__all__ = ["KTOModule"]


class KTOModule(ComparedModule):
    """Raises the probability of desirable completions and lowers that of others, measured against a reference.

    Batches are `types.UnpairedBatch`. The gradient of an optimizer step is that of the mean over its completions,
    whatever the ranks and micro-batches. Logged under ``train/`` and ``val/``: ``loss``, ``kl`` (the estimate, nats),
    ``rewards/chosen`` and ``rewards/rejected`` (beta times the log-ratio of desirable and other completions),
    ``logps/chosen``, ``logps/rejected`` (nats per completion), ``entropy`` (nats per token). In validation the estimate
    is that of each batch over all ranks.

    Args:
        model: Model to train: a config, built once the tokenizer is known, or a module. Usually fine-tuned before.
        loss: Loss of a completion.
        reference: Model that the policy is compared with, a copy or itself without adapters.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.
        compile: Modules that `torch.compile` is applied to, in place.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.

    Source:
        Ethayarajh et al. 2024, arXiv:2402.01306.
    """

    batch_type = UnpairedBatch
    batch_source = "UnpairedDataModule"

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        loss: KTO = KTO(),
        reference: Reference = CopyReference(),
        optimizer: OptimizerPart = AdamW(lr=1e-6, weight_decay=0.0),
        schedule: Schedule = Cosine(warmup=0.1),
        skip: SkipRule | None = None,
        compile: Compile = "none",
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(
            model,
            reference=reference,
            optimizer=optimizer,
            schedule=schedule,
            skip=skip,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
        )
        self.loss = loss
        self._kl: Tensor | None = None

    def training_loss(self, batch: Mapping[str, Tensor]) -> TokenLoss:
        """Return the sum over the completions of a micro-batch, and their number."""
        assert self.reference is not None
        if "mismatched_labels" in batch or self._kl is None:
            self._kl = self._estimate(batch)
        scores = token_scores(self.model, batch)
        logprobs, lengths = scores.logprobs.sum(-1), completion_lengths(batch)
        logratios = logprobs - self.reference.logprobs(self.model, batch)
        desirable, counted = batch["desirable"], lengths > 0
        self.record("entropy", scores.entropies.detach().sum(), lengths.sum())
        for name, chosen in (("chosen", desirable & counted), ("rejected", ~desirable & counted)):
            rewards = self.loss.beta * logratios.detach()
            self.record(f"rewards/{name}", torch.where(chosen, rewards, 0).sum(), chosen.sum())
            self.record(f"logps/{name}", torch.where(chosen, logprobs.detach(), 0).sum(), chosen.sum())
        return sum_over_pairs(self.loss(logratios, desirable, self._kl), counted)

    @torch.no_grad()
    def _estimate(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the KL estimate over the mismatched rows of all ranks, at least 0. Collective: call on all ranks."""
        assert self.reference is not None
        names = ("input_ids", "labels", "position_ids")
        rows = {name: batch[f"mismatched_{name}"] for name in names if f"mismatched_{name}" in batch}
        if len(rows) < len(names):
            raise ConfigurationError(
                f"The batch has {sorted(batch)}, and KTO needs mismatched rows (mismatched_input_ids, "
                "mismatched_labels, mismatched_position_ids) in a step's first micro-batch. Use UnpairedDataModule."
            )
        sums = torch.zeros(2, device=self.device)
        for part in _chunks(rows, len(batch["labels"])):
            moved = completion_logprobs(self.model, part) - self.reference.logprobs(self.model, part)
            counted = completion_lengths(part) > 0
            sums += torch.stack((torch.where(counted, moved, 0).sum(), counted.sum()))
        trainer = trainer_of(self)
        if trainer is not None and trainer.world_size > 1:
            sums = torch.as_tensor(trainer.strategy.reduce(sums, reduce_op="sum"))
        kl = (sums[0] / sums[1].clamp(min=1)).clamp(min=0)
        self.record("kl", kl)
        return kl

    def target_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the number of tokens of all completions: the loss counts completions."""
        return completion_lengths(batch).sum()

    def evaluate_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of the loss over completions as ``nll_sum``, and their number as ``num_tokens``."""
        kl = self._kl
        sums = super().evaluate_batch(batch)
        self._kl = kl  # a validation may come between two micro-batches of a step
        return sums


def _chunks(rows: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    count = len(rows["labels"])
    return [{name: value[first : first + size] for name, value in rows.items()} for first in range(0, count, size)]
