"""Probability that at least one of k completions is right."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["pass_at"]


def pass_at(num_correct: NDArray[np.int64], num_samples: int, k: int) -> NDArray[np.float64]:
    """Return the unbiased estimate of pass@k for each problem: the probability that one of ``k`` samples is right.

    It is one minus the fraction of the subsets of ``k`` samples without a right one.

    Args:
        num_correct: Number of right samples of each problem.
        num_samples: Number of samples of each problem.
        k: Number of attempts; at most ``num_samples``.

    Raises:
        ValueError: If there are fewer samples than attempts.

    Source:
        Chen et al. 2021, arXiv:2107.03374, equation 1.

    Example:
        >>> pass_at(np.array([0, 1, 2]), num_samples=2, k=1).tolist()
        [0.0, 0.5, 1.0]
    """
    if k > num_samples:
        raise ValueError(f"k={k} is more than num_samples={num_samples}; sample more, or use a smaller k.")
    wrong = num_samples - num_correct.astype(np.float64)
    missed = np.ones_like(wrong)
    for drawn in range(k):
        missed *= np.clip(wrong - drawn, 0, None) / (num_samples - drawn)
    return np.asarray(1 - missed)
