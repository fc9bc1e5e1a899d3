"""Training a reward model on pairs of completions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.functional.preference import bradley_terry_loss
from lightning_lm.models import ModelConfig
from lightning_lm.modules.activation_checkpointing import ActivationCheckpointing
from lightning_lm.modules.base import Compile, LMModule
from lightning_lm.modules.preference.pairs import completion_lengths, counted_pairs, sum_over_pairs, wins
from lightning_lm.modules.reward_model import RewardModel
from lightning_lm.optim import AdamW, Cosine, OptimizerPart, Schedule, SkipRule
from lightning_lm.parts import Limit, Part
from lightning_lm.types import PairBatch

__all__ = ["BradleyTerry", "RewardModule"]


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(Part, limits={"center_coefficient": Limit.NON_NEGATIVE}):
    """Bradley-Terry loss of a pair: the negative log-probability that the chosen completion wins.

    Args:
        use_margin: Ask for a distance of the rewards as large as the data's ``margin``.
        center_coefficient: Weight of the square of the sum of both rewards, which holds their mean near zero. Unitless.

    Source:
        Ouyang et al. 2022, arXiv:2203.02155, equation 1; the rest as in `functional.preference.bradley_terry_loss`.
    """

    use_margin: bool = True
    center_coefficient: float = 0.0

    def __call__(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        """Return the loss of each pair.

        Args:
            chosen: Rewards of the preferred completions.
            rejected: Rewards of the others.
            margin: Margin of the preferred completions, in units of reward.
        """
        wanted = margin if self.use_margin else torch.zeros_like(margin)
        return bradley_terry_loss(chosen, rejected, margin=wanted, center_coefficient=self.center_coefficient)


class RewardModule(LMModule):
    """Trains a reward model on preference pairs.

    Batches are `types.PairBatch`. The gradient of an optimizer step is that of the mean over its pairs, whatever the
    ranks and micro-batches. Logged under ``train/`` and ``val/``: ``loss``, ``accuracy`` (a tie counts one half),
    ``margin`` (difference of the rewards), ``mean_reward``, ``min_reward``, ``max_reward``.

    Args:
        model: Becomes the backbone: a config, built once the tokenizer is known, or a module.
        loss: Loss of a pair.
        optimizer: Optimizer; it groups the parameters by their roles.
        schedule: Factor on the learning rates.
        skip: Rule for skipping a step; costs one synchronisation with the device at every step.
        compile: Modules that `torch.compile` is applied to, in place.
        activation_checkpointing: Activations that the backward pass recomputes to save memory.
    """

    batch_type = PairBatch
    batch_source = "PreferenceDataModule"

    def __init__(
        self,
        model: ModelConfig | nn.Module,
        *,
        loss: BradleyTerry = BradleyTerry(),
        optimizer: OptimizerPart = AdamW(lr=1e-5),
        schedule: Schedule = Cosine(warmup=0.1),
        skip: SkipRule | None = None,
        compile: Compile = "none",
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(
            model,
            optimizer=optimizer,
            schedule=schedule,
            skip=skip,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
        )
        self.loss = loss

    def configure_model(self) -> None:
        """Build the backbone and put the new output layer on it, once."""
        super().configure_model()
        if not isinstance(self.model, RewardModel):
            self.model = RewardModel(self.model)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the reward of each row; see `RewardModel`.

        Args:
            input_ids: Prompts with completions, padded on the right; int64 [rows, seq].
            lengths: Tokens of each row; int64 [rows].
        """
        rewards: Tensor = self.model(input_ids, lengths)
        return rewards

    def training_loss(self, batch: Mapping[str, Tensor]) -> TokenLoss:
        """Return the sum over the pairs of a micro-batch, and their number."""
        chosen, rejected = self.model(batch["input_ids"], batch["lengths"]).chunk(2)
        counted = counted_pairs(batch)
        self._record(chosen.detach(), rejected.detach(), counted)
        return sum_over_pairs(self.loss(chosen, rejected, batch["margin"]), counted)

    def target_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the number of tokens of all completions: the loss counts pairs."""
        return completion_lengths(batch).sum()

    def _record(self, chosen: Tensor, rejected: Tensor, counted: Tensor) -> None:
        number = counted.sum()
        for name, value in {"accuracy": wins(chosen, rejected), "margin": chosen - rejected}.items():
            self.record(name, torch.where(counted, value, 0).sum(), number)
        both = torch.cat([chosen, rejected])
        of_both = counted.repeat(2)
        self.record("mean_reward", torch.where(of_both, both, 0).sum(), 2 * number)
        self.record_min("min_reward", torch.where(of_both, both, torch.inf).min())
        self.record_max("max_reward", torch.where(of_both, both, -torch.inf).max())

    def evaluate_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of the loss over pairs as ``nll_sum``, and the number of pairs as ``num_tokens``."""
        with torch.no_grad():
            sums = self.training_loss(batch)
        return {"nll_sum": sums.nll_sum, "num_tokens": sums.num_tokens}
