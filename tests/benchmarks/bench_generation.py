"""Cached generation beside litgpt and transformers: tokens per CPU-second, one thread, paired in one process.

All generate the same number of tokens from models of the same shape and size (16.9 M parameters, float32). Each uses
its own public generation function. The rounds alternate between them, so that a busy machine is busy for all.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import cpu_seconds, write_record

from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig

VOCAB, D_MODEL, NUM_LAYERS, NUM_HEADS, HIDDEN, CONTEXT = 8192, 384, 6, 6, 1024, 256
PROMPT, NEW = 64, 128
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "temperature 0.8, top-k 50": Sampling(temperature=0.8, top_k=50, seed=0),
}


def ours(prompts: torch.Tensor, sampling: Sampling) -> Callable[[], int]:
    layer = Layer(mixer=Attention(num_heads=NUM_HEADS), ffn=GLU(hidden_size=HIDDEN))
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=D_MODEL, num_layers=NUM_LAYERS, layers=layer, context_length=CONTEXT
    )
    generator = Generator(config.build().eval())
    rows = prompts.tolist()
    return lambda: sum(
        len(completion.token_ids) for completion in generator.generate(rows, sampling=sampling, max_new_tokens=NEW)
    )


def litgpt(prompts: torch.Tensor, sampling: Sampling) -> Callable[[], int]:
    from litgpt import GPT, Config
    from litgpt.generate.base import batched_generate_fn, generate_fn

    config = Config(
        n_layer=NUM_LAYERS,
        n_embd=D_MODEL,
        n_head=NUM_HEADS,
        vocab_size=VOCAB,
        padded_vocab_size=VOCAB,
        block_size=CONTEXT,
        intermediate_size=HIDDEN,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config).eval()
    model.max_seq_length = PROMPT + NEW
    model.set_kv_cache(batch_size=len(prompts))
    ends = {"include_prompt": False, "include_eos": False}
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k}

    def single() -> int:
        return sum(1 for _ in generate_fn(model, prompts[0], PROMPT + NEW, **options, **ends))

    def batched() -> int:
        steps = batched_generate_fn(model, prompts, PROMPT + NEW, sample_args=options, **ends)
        return sum(len(step) for step in steps)

    return single if len(prompts) == 1 else batched


def transformers(prompts: torch.Tensor, sampling: Sampling) -> Callable[[], int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=HIDDEN,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=CONTEXT,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": NEW, "do_sample": not sampling.greedy}
    if not sampling.greedy:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k}

    def generate() -> int:
        return model.generate(prompts, **options)[:, PROMPT:].numel()

    return generate


def measure(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Return tokens per CPU-second of each in its best round, and the median ratio of the first's speed to its."""
    tokens = {name: run() for name, run in contenders.items()}  # the first round warms up

    def run(name: str) -> None:
        assert contenders[name]() == tokens[name]

    seconds = cpu_seconds(contenders, run, rounds)
    first = next(iter(contenders))
    return {
        name: {
            "tokens": tokens[name],
            "tokens_per_cpu_s": round(tokens[name] / min(times), 1),
            "median_ratio_of_our_speed_to_its": round(
                statistics.median(b / a for a, b in zip(seconds[first], times, strict=True)), 3
            ),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", nargs="*", default=["litgpt", "transformers"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peers = {"litgpt": litgpt, "transformers": transformers}
    results = {}
    for batch_size, (name, sampling) in itertools.product((1, 8), SAMPLINGS.items()):
        prompts = torch.randint(1, VOCAB, (batch_size, PROMPT))
        contenders = {"lightning_lm": ours(prompts, sampling)}
        contenders |= {peer: peers[peer](prompts, sampling) for peer in args.peers}
        key = f"batch {batch_size}, {name}"
        results[key] = measure(contenders, args.rounds)
        print(key, results[key], flush=True)
    write_record(args.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
