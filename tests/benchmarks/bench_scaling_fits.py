"""The parametric fit: CPU-seconds of a fit and of its bootstraps, and the coverage of its intervals, beside scipy.

    python tests/benchmarks/bench_scaling_fits.py --output tests/benchmarks/results/scaling_fits.json

Runs follow the law of Hoffmann et al. 2022 with 1 % noise. scipy minimises the same sum from the same start, so the
ratio compares solvers, not models. CPU-seconds of this process on one thread, minimum of the rounds.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np
from record import write_record
from scipy.optimize import least_squares

from lightning_lm.scaling import Estimator, Points, fit_parametric
from lightning_lm.scaling.fits.laws import ChinchillaLaw
from lightning_lm.scaling.fits.parametric import problem_of
from lightning_lm.scaling.fits.solver import start_of_powers

TRUTH = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
REPETITIONS, ROUNDS = 200, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    points = runs(240, seed=0)
    results = {
        "fit of 240 points, ms": 1e3 * fastest(lambda: fit_parametric(points, Estimator(num_bootstraps=0))),
        "the same by scipy from the same start, ms": 1e3 * fastest(lambda: by_scipy(points)),
        "4,000 bootstraps of 240 points, s": fastest(lambda: fit_parametric(points, Estimator(num_bootstraps=4000)), 2),
        **coverage(),
    }
    results = {name: float(f"{value:.4g}") for name, value in results.items()}
    print(results)
    write_record(arguments.output, command=shlex.join(["python", *sys.argv]), results=results)


def runs(number: int, seed: int) -> Points:
    where, scatter = np.random.default_rng(0), np.random.default_rng(seed).standard_normal(number)
    N = np.exp(where.uniform(np.log(4e7), np.log(1.6e10), number))
    D = np.exp(where.uniform(np.log(6e18), np.log(3e21), number)) / 6 / N
    return Points.of(N, D, (1.69 + 406.4 / N**0.34 + 410.7 / D**0.28) * np.exp(0.01 * scatter))


def fastest(function, rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return min(times)


def by_scipy(points: Points) -> np.ndarray:
    middle = [float(np.exp(np.log(column).mean())) for column in (points.parameters, points.tokens)]
    law = ChinchillaLaw(size_centre=middle[0], token_centre=middle[1])
    problem = problem_of(law, points, 1e-3)
    start = start_of_powers(points.parameters / middle[0], points.tokens / middle[1], points.loss, points.weights)
    return least_squares(
        lambda theta: problem.residuals(theta[None])[0],
        start,
        jac=lambda theta: problem.slopes(theta[None])[0],
        loss="huber",
        f_scale=1e-3,
        x_scale="jac",
    ).x


def coverage() -> dict[str, float]:
    budget = 1e23
    size = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (budget / 6) ** (0.28 / 0.62)
    hits = dict.fromkeys([*TRUTH, "optimal size at 1e23", "tokens per parameter at 1e23"], 0)
    for seed in range(REPETITIONS):
        fit = fit_parametric(runs(240, seed=seed), Estimator(num_bootstraps=400))
        best = fit.optimal(budget)
        held = {**fit.intervals(), "optimal size at 1e23": best.parameters}
        held["tokens per parameter at 1e23"] = best.tokens_per_parameter
        truth = {**TRUTH, "optimal size at 1e23": size, "tokens per parameter at 1e23": budget / 6 / size**2}
        for name in hits:
            hits[name] += truth[name] in held[name]
    return {f"coverage of 95 % intervals, {name}": hit / REPETITIONS for name, hit in hits.items()}


if __name__ == "__main__":
    main()
