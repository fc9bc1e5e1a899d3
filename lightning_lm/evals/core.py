"""CORE: accuracies centred on chance and averaged over tasks (Li et al. 2024, arXiv:2406.11794)."""

import math
from collections.abc import Mapping

from lightning_lm.errors import ConfigurationError

__all__ = ["centred", "core_score"]


def centred(accuracy: float, chance: float) -> float:
    """Return an accuracy on the scale on which chance is 0 and perfection 1; below chance it is negative.

    Args:
        accuracy: Fraction of right answers.
        chance: Accuracy of random answers, below 1.

    Raises:
        ConfigurationError: If chance is not from 0 to below 1.

    Example:
        >>> centred(0.625, chance=0.25)
        0.5
    """
    if not 0 <= chance < 1:
        raise ConfigurationError(f"chance={chance} must be at least 0 and below 1.")
    return (accuracy - chance) / (1 - chance)


def core_score(accuracies: Mapping[str, float], chances: Mapping[str, float]) -> float:
    """Return the mean of the centred accuracies of several tasks, each with the same weight.

    Args:
        accuracies: Accuracy by task.
        chances: Accuracy of random answers by task; of each of ``accuracies``.

    Raises:
        ConfigurationError: If there is no task, or a task has no chance.

    Example:
        >>> core_score({"arc": 0.625, "lambada": 0.25}, {"arc": 0.25, "lambada": 0.0})
        0.375
    """
    missing = sorted(accuracies.keys() - chances.keys())
    if missing or not accuracies:
        raise ConfigurationError(f"CORE needs tasks and the chance of each; {missing or 'no task'} given without.")
    return math.fsum(centred(accuracies[name], chances[name]) for name in accuracies) / len(accuracies)
