"""Critic: a model that predicts the return of an unfinished completion, its loss, and the KL penalty in its rewards."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models.config import ModelConfig
from lightning_lm.models.roles import parameter_roles, with_role
from lightning_lm.models.unpadding import outputs_at
from lightning_lm.modules.token_losses import next_token_inputs, target_mask
from lightning_lm.parts import Limit, Part
from lightning_lm.protocols import is_language_model

__all__ = ["Critic", "KLReward", "ValueModel"]


@dataclass(frozen=True, kw_only=True)
class Critic(
    Part,
    limits={
        "clip": Limit.POSITIVE,
        "coefficient": Limit.NON_NEGATIVE,
        "lr_scale": Limit.POSITIVE,
        "warmup": Limit.NON_NEGATIVE,
    },
):
    """Training of the critic, and its use of rewards.

    Args:
        gamma: Discount a token.
        lam: 0 trusts the critic, 1 the rewards.
        clip: Largest change of a value in one rollout, in units of reward; ``None`` for no limit.
        coefficient: Weight of its loss against the policy's.
        lr_scale: Its learning rate over the policy's: it starts from nothing.
        warmup: Optimizer steps at the start in which it learns alone.
        model: Model that it starts from, with the policy's tokenizer, such as a `RewardCheckpoint`; ``None`` for a
            copy of the policy. Its new output layer begins at zero.
    """

    gamma: float = 1.0
    lam: float = 0.95
    clip: float | None = 0.2
    coefficient: float = 0.5
    lr_scale: float = 10.0
    warmup: int = 0
    model: ModelConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ConfigurationError(f"gamma={self.gamma} and lam={self.lam} must be from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class KLReward(Part, limits={"coefficient": Limit.NON_NEGATIVE, "target": Limit.POSITIVE, "horizon": Limit.COUNT}):
    """Per-token KL penalty towards the policy at the start, subtracted from the reward.

    Args:
        coefficient: Reward lost per nat.
        estimator: Estimator of the KL divergence; see `functional.policy.kl_estimate`.
        target: If given, the coefficient is changed until a completion is this far from the start. Nats.
        horizon: Over how many completions it is changed.

    Source:
        Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    coefficient: float = 0.05
    estimator: Literal["k1", "k2", "k3"] = "k1"
    target: float | None = None
    horizon: int = 10_000

    def adapted(self, coefficient: float, kl: float, answers: int) -> float:
        """Return the next coefficient.

        Args:
            coefficient: The present one.
            kl: Mean distance of the completions, nats.
            answers: Number of completions.
        """
        if self.target is None:
            return coefficient
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return coefficient * (1 + error * answers / self.horizon)


class ValueModel(nn.Module):
    """The body of a language model with one number per token in place of logits.

    The mean reward is kept apart, in ``mean_reward``. Were it learned, all hidden states would first be bent
    towards it, and what tells a good beginning from a bad one would be lost.

    Args:
        model: Meets `protocols.LanguageModel`, or is a `RewardModel`. Its language model is copied as it is now; the
            output layer is not used, and frozen.

    Attributes:
        body: The copy.
        value: The new output layer; it begins at zero.
        mean_reward: Mean reward of the newest rollout; added to each value.

    Raises:
        ConfigurationError: If the model has no `hidden` and `head`.
    """

    body: Any
    value: nn.Linear
    mean_reward: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model = getattr(model, "backbone", model)  # of a reward model
        if not is_language_model(model):
            raise ConfigurationError(
                f"A critic reads the hidden states of a model, and {type(model).__name__} has no 'hidden' and 'head'. "
                "Wrap a causal language model of transformers in TransformersModel."
            )
        self.body = copy.deepcopy(model)
        weight: Tensor = self.body.head.weight
        self.value = with_role(nn.Linear(weight.shape[1], 1), "head").to(weight)
        for parameter in self.value.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("mean_reward", torch.zeros((), dtype=torch.float32, device=weight.device))
        self._freeze_head()

    def _freeze_head(self) -> None:
        """Freeze what gets no gradient, for which data-parallel training would wait; a tied head is an embedding."""
        roles = parameter_roles(self.body)
        unused = {id(parameter) for parameter in self.body.head.parameters()}
        for name, parameter in self.body.named_parameters():
            if id(parameter) in unused and roles[name] != "embedding":
                parameter.requires_grad_(False)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the value at each target token, float32 [rows, seq - 1], 0 elsewhere.

        Args:
            batch: A `types.TokenBatch`.
        """
        mask = target_mask(batch)
        values: Tensor = (
            self.value(outputs_at(self.body, next_token_inputs(batch), mask))[:, 0].float() + self.mean_reward
        )
        return values.new_zeros(mask.shape).masked_scatter(mask, values)
