"""Plan of rollouts: sampling and scoring of completions, epochs over them, and validation on held-out prompts."""

import dataclasses

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Backend, OwnBackend, Sampling
from lightning_lm.parts import Part
from lightning_lm.rewards import Scoring

__all__ = ["RolloutPlan", "Validation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation(Part):
    """Validation on held-out prompts: always with the weights in training, never by a server that has its own.

    Args:
        samples: Completions of each prompt.
        sampling: Sampling settings; greedy by default. The noise is the same each time.
        pass_at: The ``k`` of each ``val/pass@k``: how likely one of ``k`` completions is right.
        threshold: A completion is right if the first reward gives at least this.
    """

    samples: int = 1
    sampling: Sampling = Sampling(temperature=0.0)
    pass_at: tuple[int, ...] = (1,)
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 1 or min(self.pass_at, default=1) < 1:
            raise ConfigurationError(f"samples={self.samples} and each of pass_at={self.pass_at} must be at least 1.")
        if max(self.pass_at, default=1) > self.samples:
            raise ConfigurationError(f"pass_at={self.pass_at} needs as many answers, and samples={self.samples}.")
        if self.samples > 1 and self.sampling.greedy:
            raise ConfigurationError(
                f"samples={self.samples} greedy answers are all the same; give a sampling with a temperature."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutPlan(Part):
    """Plan of rollouts: sampling and scoring of completions, and the epochs over them.

    Args:
        samples_per_prompt: Completions of each prompt: the size of a group.
        max_new_tokens: Most tokens of a completion.
        sampling: Sampling settings. Only a temperature: the distribution that is trained is the one that was sampled.
        backend: Generator of the completions.
        epochs: Number of epochs over a rollout.
        minibatches: Optimizer steps that an epoch is cut into.
        mask_truncated: Do not train on truncated completions. They still count in its group's baseline.
        resample_rounds: Largest number of rounds in which zero-variance groups are replaced by new ones.
        max_staleness: Most optimizer steps from a completion to learning from it, and most by which the weights of a
            server may be older than the policy; more is refused. By default as many as a rollout makes necessary, and
            any number for a server (``rollout/sampler_staleness`` says how many).
        importance_cap: If given, a token counts as much more or less as the policy in training gives it more or less
            probability than the one that generated, up to this factor. For generation in another precision or engine,
            and needed where a server answers with older weights.
        reward_weights: One factor per reward; all 1 by default.
        scoring: Way of calling rewards.
        rows_at_once: Most completions that are generated, or scored, together. Changes no completion.
        validation: Validation on held-out prompts.
    """

    samples_per_prompt: int = 8
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    backend: Backend = OwnBackend()
    epochs: int = 1
    minibatches: int = 1
    mask_truncated: bool = False
    resample_rounds: int = 0
    max_staleness: int | None = None
    importance_cap: float | None = None
    reward_weights: tuple[float, ...] | None = None
    scoring: Scoring = Scoring()
    rows_at_once: int | None = None
    validation: Validation = Validation()

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_new_tokens", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 1.")
        for name, limit in {"resample_rounds": 0, "max_staleness": 0, "rows_at_once": 1, "importance_cap": 0}.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ConfigurationError(f"{name}={value} must be at least {limit}.")
        plain = Sampling(temperature=self.sampling.temperature, seed=self.sampling.seed)
        if self.sampling.greedy or self.sampling != plain:
            raise ConfigurationError(
                f"{self.sampling} does not sample from the distribution that is trained, so its gradient would be "
                "wrong. Set only a temperature above 0; top_k, top_p, min_p and penalties must stay off."
            )
        self._check_backend()

    def _check_backend(self) -> None:
        push = self.backend.push
        lags = self.backend.has_own_weights and (push is None or push.every > self.steps)
        if lags and self.importance_cap is None:
            raise ConfigurationError(
                f"{type(self.backend).__name__} answers with weights that are older than the policy, which makes the "
                "gradient wrong. Let the server have the weights before every rollout (weights=WeightPush(...), with "
                f"every at most {self.steps}), or set importance_cap, such as 2.0, to correct for some of it."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps that a rollout lasts."""
        return self.epochs * self.minibatches
