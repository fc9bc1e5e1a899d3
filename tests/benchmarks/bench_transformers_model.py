"""Training step of a Llama in a `TransformersModel` beside our own model of the same shape: packed rows and plain ones.

Forward, loss and backward of 2 rows of 512 tokens, packed with documents of 64; one thread, CPU time; the two take
turns in one process.

    python tests/benchmarks/bench_transformers_model.py --output tests/benchmarks/results/transformers_model.json
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from record import cpu_seconds, write_record
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lm.models import GLU, Attention, Layer, TransformerConfig, TransformersModel

VOCAB, D_MODEL, NUM_LAYERS, NUM_HEADS, HIDDEN, ROWS, LENGTH, DOCUMENT = 2048, 256, 4, 4, 704, 2, 512, 64


def own() -> nn.Module:
    layer = Layer(mixer=Attention(num_heads=NUM_HEADS), ffn=GLU(hidden_size=HIDDEN))
    shape = {"vocab_size": VOCAB, "d_model": D_MODEL, "num_layers": NUM_LAYERS, "context_length": LENGTH}
    return TransformerConfig(layers=layer, **shape).build()


def of_transformers() -> nn.Module:
    shape = {"hidden_size": D_MODEL, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": NUM_HEADS}
    config = LlamaConfig(vocab_size=VOCAB, intermediate_size=HIDDEN, max_position_embeddings=LENGTH, **shape)
    return TransformersModel(LlamaForCausalLM(config))


def measure(models: dict[str, nn.Module], document_ids: Tensor | None, rounds: int) -> dict[str, float]:
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH))

    def step(name: str) -> None:
        logits = models[name](ids, document_ids=document_ids)
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        models[name].zero_grad()

    for name in models:
        step(name)
    seconds = cpu_seconds(models, step, rounds)
    best = {f"{name}_best_cpu_ms": round(1e3 * min(times), 1) for name, times in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    return best | {"median_ratio": round(statistics.median(ratios), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {"Transformer": own(), "TransformersModel": of_transformers()}
    documents = (torch.arange(LENGTH) // DOCUMENT).expand(ROWS, -1)
    results = {
        "packed": measure(models, documents, arguments.rounds),
        "plain": measure(models, None, arguments.rounds),
    }
    print(results, flush=True)
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
