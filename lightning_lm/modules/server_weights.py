"""Transfer of the policy's weights to an inference server, and the version it answers with."""

from lightning.pytorch import Trainer
from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.modules.plan import RolloutPlan
from lightning_lm.modules.ranks import whole_model
from lightning_lm.protocols import Tokenizer

__all__ = ["ServerWeights"]


class ServerWeights:
    """Keeps account of the weights that a server has.

    Args:
        plan: Names the backend, and how old its weights may be.
    """

    def __init__(self, plan: RolloutPlan) -> None:
        self._plan = plan
        self._step: int | None = None

    def update(self, model: nn.Module, tokenizer: Tokenizer | None, trainer: Trainer) -> int:
        """Give the server the policy's weights if it is time, on every rank; return the age of those that will answer.

        Args:
            model: The policy.
            tokenizer: That of the policy.
            trainer: Trainer that knows the step and the other ranks.

        Returns:
            Optimizer steps from the server's weights to the policy's; the server begins with those of step 0.

        Raises:
            ConfigurationError: If they are older than the plan allows.
            RemoteError: If the server does not take them.
        """
        plan, step = self._plan, trainer.global_step
        push = plan.backend.push
        if push is not None and (self._step is None or step - self._step >= push.every):
            with whole_model(trainer):
                if trainer.is_global_zero:
                    push(model, tokenizer)
            trainer.strategy.barrier()
            self._step = step
        age = step - (self._step or 0)
        if plan.max_staleness is not None and age > plan.max_staleness:
            raise ConfigurationError(
                f"The server's weights are {age} optimizer steps old, and max_staleness={plan.max_staleness}. Push "
                "them more often (WeightPush(every=...)), or raise max_staleness."
            )
        return age
