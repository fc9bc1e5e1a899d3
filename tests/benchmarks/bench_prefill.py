"""Prompts of very different lengths in one call, beside one call for each, and padded to the longest.

64 prompts of 8 to 512 tokens, one thread, CPU time; the ways take turns in one process.

    python tests/benchmarks/bench_prefill.py --output tests/benchmarks/results/prefill.json
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from record import cpu_seconds, write_record

from lightning_lm.generation import Generator, Sampling, forward
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig, TransformersModel

VOCAB, D_MODEL, NUM_LAYERS, NUM_HEADS, HIDDEN, CONTEXT = 8192, 384, 6, 6, 1024, 1024
NUM_PROMPTS, SHORTEST, LONGEST = 64, 8, 512
GREEDY = Sampling(temperature=0)


def own() -> torch.nn.Module:
    layer = Layer(mixer=Attention(num_heads=NUM_HEADS), ffn=GLU(hidden_size=HIDDEN))
    shape = {"vocab_size": VOCAB, "d_model": D_MODEL, "num_layers": NUM_LAYERS, "context_length": CONTEXT}
    return TransformerConfig(layers=layer, **shape).build().eval()


def of_transformers() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": D_MODEL, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": NUM_HEADS}
    config = LlamaConfig(
        vocab_size=VOCAB, intermediate_size=HIDDEN, max_position_embeddings=CONTEXT, eos_token_id=None, **shape
    )
    return TransformersModel(LlamaForCausalLM(config).eval())


def ways(generator: Generator, prompts: list[list[int]]) -> dict[str, Callable[[], object]]:
    def call(rows: list[list[int]], new: int) -> object:
        return generator.generate(rows, sampling=GREEDY, max_new_tokens=new)

    def padded() -> object:
        with mock.patch.object(forward, "_PASS_COSTS", {"default": 10**9}):
            return call(prompts, 1)

    return {
        "one by one, 1 new token": lambda: [call([prompt], 1) for prompt in prompts],
        "in one call, 1 new token": lambda: call(prompts, 1),
        "padded to the longest, 1 new token": padded,
        "in one call, 32 new tokens": lambda: call(prompts, 32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = torch.linspace(SHORTEST, LONGEST, NUM_PROMPTS).long()[torch.randperm(NUM_PROMPTS)].tolist()
    prompts = [torch.randint(1, VOCAB, (length,)).tolist() for length in lengths]
    results = {}
    for name, model in {"Transformer": own(), "TransformersModel": of_transformers()}.items():
        contenders = ways(Generator(model), prompts)
        seconds = cpu_seconds(contenders, lambda way, ways=contenders: ways[way](), arguments.rounds)
        base = seconds["one by one, 1 new token"]
        results[name] = {
            way: {
                "best_cpu_s": round(min(times), 2),
                "median_ratio_to_one_by_one": round(
                    statistics.median(a / b for a, b in zip(times, base, strict=True)), 3
                ),
            }
            for way, times in seconds.items()
        }
        print(name, results[name], flush=True)
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
