"""Reference of a policy: a frozen copy, or the policy itself with its adapters off. See also `modules.precomputed`."""

import abc
import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.modules.token_losses import token_scores
from lightning_lm.parts import Part

__all__ = [
    "AdapterReference",
    "CopyReference",
    "FrozenCopy",
    "Reference",
    "ReferenceScores",
    "SlowSync",
    "adapters_off",
    "completion_logprobs",
]

Batch = Mapping[str, Tensor]


class ReferenceScores(nn.Module, abc.ABC):
    """A reference at work: it is a submodule of the module that trains, so checkpoints hold what it needs."""

    @abc.abstractmethod
    def logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the log-probability of each row's completion, without a gradient; float32 [rows], nats.

        Args:
            model: The policy, in evaluation mode.
            batch: A `types.PairBatch`.
        """

    def prepare(self, module: LightningModule) -> None:
        """Compute what is needed before training; called on every rank once the strategy is set up."""

    def follow(self, model: nn.Module, step: int) -> None:
        """Move with the policy.

        Args:
            model: The policy.
            step: Number of optimizer steps that are done.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference(Part, abc.ABC):
    """Base of the references that YAML can name."""

    @abc.abstractmethod
    def build(self, model: nn.Module, data: object) -> ReferenceScores:
        """Return the reference.

        Args:
            model: The policy, not yet trained.
            data: The datamodule, or None.
        """


def completion_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the log-probability of each row's completion, without a gradient; float32 [rows], nats.

    Args:
        model: Gives the log-probabilities; in evaluation mode.
        batch: A `types.TokenBatch`.
    """
    with torch.no_grad():
        return token_scores(model, batch).logprobs.sum(-1)


# --- a copy ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlowSync(Part):
    """Let the reference follow the policy slowly: ``reference += alpha * (policy - reference)`` now and then.

    Args:
        alpha: Share of the way. Unitless.
        every: Optimizer steps from one time to the next.

    Source:
        Gorbatovski et al. 2024 (TR-DPO), arXiv:2404.09656, section 3.
    """

    alpha: float = 0.6
    every: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or self.every < 1:
            raise ConfigurationError(
                f"alpha={self.alpha} must be above 0 and at most 1, and every={self.every} at least 1."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyReference(Reference):
    """A copy of the policy as it was at the start. Costs the memory of its weights.

    Args:
        sync: Let it follow the policy; ``None`` keeps it as it is.
    """

    sync: SlowSync | None = None

    def build(self, model: nn.Module, data: object) -> "FrozenCopy":
        """Return the copy."""
        return FrozenCopy(model, self.sync)


class FrozenCopy(ReferenceScores):
    """A copy of a model that is never trained and never drops features.

    Args:
        model: Model to copy.
        sync: Schedule by which the copy follows the model, if at all.
    """

    def __init__(self, model: nn.Module, sync: SlowSync | None = None) -> None:
        super().__init__()
        self.model, self._sync = copy.deepcopy(model).requires_grad_(False), sync
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenCopy":
        """Stay in evaluation mode, whatever the mode of the module around it."""
        return super().train(False)

    def logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the log-probability of each row's completion."""
        return completion_logprobs(self.model, batch)

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int) -> None:
        """Take a step towards the policy where it is time."""
        if self._sync is None or step % self._sync.every:
            return
        policy = dict(model.named_parameters())
        mine = dict(self.model.named_parameters())
        torch._foreach_lerp_(list(mine.values()), [policy[name] for name in mine], self._sync.alpha)


# --- adapters ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterReference(Reference):
    """The policy itself with its adapters off, as `lightning_lm.callbacks.LoRA` puts them on. Costs no memory."""

    def build(self, model: nn.Module, data: object) -> "ReferenceScores":
        """Return the reference."""
        return _AdaptersOff()


class _AdaptersOff(ReferenceScores):
    def logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        with adapters_off(model):
            return completion_logprobs(model, batch)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch all adapters of ``peft`` off, and on again at the end, also after an error.

    Args:
        model: Has them.

    Raises:
        ConfigurationError: If it has none: it would be compared with itself.
        MissingDependencyError: If ``peft`` is not installed.
    """
    layers = _adapter_layers(model)
    if not layers:
        raise ConfigurationError(
            "The model has no adapters to switch off, so it would be compared with itself. Add the callback LoRA, or "
            "use reference=CopyReference()."
        )
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    was_off = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)  # type: ignore[operator]
        yield
    finally:
        for layer, off in zip(layers, was_off, strict=True):
            layer.enable_adapters(not off)  # type: ignore[operator]
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _adapter_layers(model: nn.Module) -> list[nn.Module]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError as error:
        raise MissingDependencyError("peft", "switch adapters off", "hf") from error
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
