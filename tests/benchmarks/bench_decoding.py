"""One row decoded greedily, beside the bare products of its linear layers: milliseconds a token.

The peer calls ``torch.nn.functional.linear`` with every weight of the model once a token and does nothing else. One
thread, CPU time; the two take turns in one process. Reading the prompt is not counted.

    python tests/benchmarks/bench_decoding.py --output tests/benchmarks/results/decoding.json
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_generation import CONTEXT, D_MODEL, HIDDEN, NEW, NUM_HEADS, NUM_LAYERS, PROMPT, VOCAB
from record import write_record
from torch import nn

from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig


def model_of() -> nn.Module:
    layer = Layer(mixer=Attention(num_heads=NUM_HEADS), ffn=GLU(hidden_size=HIDDEN))
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=D_MODEL, num_layers=NUM_LAYERS, layers=layer, context_length=CONTEXT
    )
    return config.build().eval()


def token_ms(generator: Generator, prompt: list[int]) -> float:
    """Return the time of each token but the first, which comes from the prompt."""

    def seconds(new: int) -> float:
        start = time.process_time()
        generator.generate([prompt], sampling=Sampling(temperature=0), max_new_tokens=new)
        return time.process_time() - start

    first = seconds(1)
    return 1e3 * (seconds(NEW) - first) / (NEW - 1)


@torch.inference_mode()
def products_ms(model: nn.Module) -> float:
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    rows = {weight.size(1): torch.randn(1, 1, weight.size(1)) for weight in weights}
    start = time.process_time()
    for _ in range(NEW - 1):
        for weight in weights:
            F.linear(rows[weight.size(1)], weight)
    return 1e3 * (time.process_time() - start) / (NEW - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = model_of()
    generator, prompt = Generator(model), torch.randint(1, VOCAB, (PROMPT,)).tolist()
    token_ms(generator, prompt), products_ms(model)
    pairs = [(token_ms(generator, prompt), products_ms(model)) for _ in range(arguments.rounds)]
    ours, bare = (min(times) for times in zip(*pairs, strict=True))
    results = {
        "generation_ms_a_token": round(ours, 2),
        "bare_products_ms_a_token": round(bare, 2),
        "median_ratio": round(statistics.median(token / products for token, products in pairs), 3),
    }
    print(results, flush=True)
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
