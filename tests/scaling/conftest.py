"""Laws as papers print them, and runs that follow them."""

from types import SimpleNamespace

import numpy as np
import pytest

from lightning_lm.scaling import Points

HOFFMANN = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
"""Hoffmann et al. 2022, arXiv:2203.15556, equation 10."""


def chinchilla(N, D):
    return 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28


def optimal_size(C):
    """Equation 4 of the paper, written out."""
    return (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (C / 6) ** (0.28 / 0.62)


def scattered(number, *, noise=0.0, seed=0, plan=0):
    """Runs of random sizes and budgets, in the range of the paper."""
    where = np.random.default_rng(plan)
    N = np.exp(where.uniform(np.log(4e7), np.log(1.6e10), number))
    D = np.exp(where.uniform(np.log(6e18), np.log(3e21), number)) / 6 / N
    scatter = np.random.default_rng(seed).standard_normal(number)
    return Points.of(N, D, chinchilla(N, D) * np.exp(noise * scatter))


def isoflop(budgets, *, width=3.0, sizes=7, noise=0.0, seed=0):
    """A sweep around the optimum of each budget."""
    N = np.concatenate([optimal_size(C) * np.geomspace(1 / width, width, sizes) for C in budgets])
    D = np.repeat(budgets, sizes) / 6 / N
    return Points.of(N, D, chinchilla(N, D) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N))))


@pytest.fixture
def hoffmann():
    return SimpleNamespace(
        values=HOFFMANN, loss=chinchilla, optimal_size=optimal_size, scattered=scattered, isoflop=isoflop
    )
