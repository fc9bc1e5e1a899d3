"""Direct Preference Optimization (DPO) and its family: training on preference pairs, without a reward model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.preference import PairLogProbs, PreferenceLoss, Sigmoid
from lightning_lm.models import ModelConfig
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.base import Compile
from lightning_lm.modules.preference.compared import ComparedModule
from lightning_lm.modules.preference.pairs import completion_lengths, counted_pairs, sum_over_pairs, wins
from lightning_lm.modules.preference.reference import CopyReference, Reference
from lightning_lm.modules.token_losses import token_scores
from lightning_lm.optim import AdamW, Cosine, OptimizerPart, Schedule, SkipRule
from lightning_lm.types import PairBatch

__all__ = ["DPOModule"]


class DPOModule(ComparedModule):
    """Raises the probability of chosen over rejected completions, relative to a reference model.

    Batches are `types.PairBatch`. The gradient of an optimizer step is that of the mean over its pairs, whatever the
    ranks and micro-batches. Dropout is off: it would add noise to every comparison. Logged under ``train/`` and
    ``val/``: ``loss``, ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` (what the loss compares, times its
    beta), ``rewards/accuracies`` (a tie counts one half: at the start all pairs are tied, so it begins at 0.5),
    ``logps/chosen``, ``logps/rejected`` (nats per completion), ``entropy`` (nats per token).

    Args:
        model: Model to train: a config, built once the tokenizer is known, or a module. Usually fine-tuned before.
        loss: Loss of a pair.
        reference: Reference model; not built if the loss needs none.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.
        compile: Modules that `torch.compile` is applied to, in place.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290.
    """

    batch_type = PairBatch
    batch_source = "PreferenceDataModule"

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        loss: PreferenceLoss = Sigmoid(),
        reference: Reference = CopyReference(),
        optimizer: OptimizerPart = AdamW(lr=1e-6, weight_decay=0.0),
        schedule: Schedule = Cosine(warmup=0.1),
        skip: SkipRule | None = None,
        compile: Compile = "none",
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(
            model,
            reference=reference if loss.needs_reference else None,
            optimizer=optimizer,
            schedule=schedule,
            skip=skip,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
        )
        self.loss = loss

    def training_loss(self, batch: Mapping[str, Tensor]) -> TokenLoss:
        """Return the sum over the pairs of a micro-batch, and their number."""
        scores = token_scores(self.model, batch)
        lengths, counted = completion_lengths(batch), counted_pairs(batch)
        pairs = self._pairs(scores.logprobs.sum(-1), lengths, batch)
        self._record(pairs, counted)
        self.record("entropy", scores.entropies.detach().sum(), lengths.sum())
        return sum_over_pairs(self.loss(pairs), counted)

    def target_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the number of tokens of all completions: the loss counts pairs."""
        return completion_lengths(batch).sum()

    def _pairs(self, logprobs: Tensor, lengths: Tensor, batch: Mapping[str, Tensor]) -> PairLogProbs:
        reference = self.reference
        compared = torch.zeros_like(logprobs) if reference is None else reference.logprobs(self.model, batch)
        chosen, rejected = logprobs.chunk(2)
        reference_chosen, reference_rejected = compared.detach().chunk(2)
        chosen_lengths, rejected_lengths = lengths.clamp(min=1).to(logprobs.dtype).chunk(2)
        return PairLogProbs(chosen, rejected, reference_chosen, reference_rejected, chosen_lengths, rejected_lengths)

    @torch.no_grad()
    def _record(self, pairs: PairLogProbs, counted: Tensor) -> None:
        chosen, rejected = self.loss.rewards(pairs)
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": wins(chosen, rejected),
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
        }
        number = counted.sum()
        for name, value in values.items():
            self.record(name, torch.where(counted, value, 0).sum(), number)
