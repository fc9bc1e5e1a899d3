"""A training step of our Llama beside its own matrix products alone, in turns in one process.

    python tests/benchmarks/bench_roofline.py --output tests/benchmarks/results/roofline.json

The roofline is the rate of one large product (2048 x 2048) in the same run. A step (forward, loss, backward, clip,
fused AdamW) reaches the share of it that its products would take at that rate: six products' worth of operations for
each weight of a matrix and token, and the causal half of attention. Beside it: the products of the step as bare
``torch.mm`` into memory that is there, as the model has them and with q, k, v and gate, up merged. CPU-seconds, minima.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable

import torch
from bench_training_step import Shape, Step, our_model
from record import write_record

SHAPES = {
    "d_model 384": Shape(),
    "d_model 1024": Shape(layers=2, d_model=1024, heads=8, hidden=2816, batch=8),
}
LARGE = 2048


def products(shapes: list[tuple[int, int]], rows: int) -> Callable[[], None]:
    """Return the forward product of linear layers and the two of their backward pass.

    Args:
        shapes: Outputs and inputs of each layer.
        rows: Tokens.
    """
    tensors = {}
    for outputs, inputs in dict.fromkeys(shapes):
        x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        tensors[outputs, inputs] = (x, weight, gradient, *map(torch.empty_like, (gradient, x, weight)))

    def run() -> None:
        for shape in shapes:
            x, weight, gradient, output, x_gradient, weight_gradient = tensors[shape]
            torch.mm(x, weight.T, out=output)
            torch.mm(gradient, weight, out=x_gradient)
            torch.mm(gradient.T, x, out=weight_gradient)

    return run


def works_of(shape: Shape) -> dict[str, Callable[[], object]]:
    d, hidden, rows = shape.d_model, shape.hidden, shape.batch * shape.context
    apart = [(d, d)] * 4 + [(hidden, d)] * 2 + [(d, hidden)]
    merged = [(3 * d, d), (d, d), (2 * hidden, d), (d, hidden)]
    head = [(shape.vocab, d)]
    square = torch.randn(LARGE, LARGE)
    result = torch.empty_like(square)
    torch.manual_seed(0)
    step, tokens = Step(*our_model(shape)), torch.randint(shape.vocab, (shape.batch, shape.context + 1))
    return {
        "step": lambda: step(tokens[:, :-1], tokens[:, 1:]),
        "products": products([*apart * shape.layers, *head], rows),
        "merged products": products([*merged * shape.layers, *head], rows),
        "large product": lambda: torch.mm(square, square, out=result),
    }


def measure(shape: Shape, rounds: int) -> dict[str, float]:
    d, rows = shape.d_model, shape.batch * shape.context
    works = works_of(shape)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):  # the first round warms up
        for name in works if index % 2 else reversed(works):
            start = time.process_time()
            works[name]()
            seconds[name] += [time.process_time() - start] if index else []
    best = {name: min(times) for name, times in seconds.items()}
    weights = shape.layers * (4 * d * d + 3 * d * shape.hidden) + shape.vocab * d
    attention = 6 * shape.context * d * shape.layers  # two products of a half, and twice that backward
    flops = rows * (6 * weights + attention)
    rate = 2 * LARGE**3 / best["large product"]
    return {
        **{f"{name}, CPU-s": round(value, 4) for name, value in best.items()},
        "roofline, GFLOP/s": round(rate / 1e9, 1),
        "step, share of the roofline": round(flops / best["step"] / rate, 3),
        "its products alone, share of the roofline": round(6 * rows * weights / best["products"] / rate, 3),
        "its products alone / step": round(best["products"] / best["step"], 3),
        "merged products / products": round(best["merged products"] / best["products"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where the record goes; printed only where left out")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, shape in SHAPES.items():
        results[name] = measure(shape, args.rounds)
        print(name, results[name], flush=True)
    if args.output:
        write_record(args.output, command=shlex.join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
