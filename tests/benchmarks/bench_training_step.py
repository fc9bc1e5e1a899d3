"""One training step of the same Llama configuration: ours, transformers' and litgpt's, in turns in one process.

    python tests/benchmarks/bench_training_step.py --output tests/benchmarks/results/training_step.json

transformers and litgpt must be importable. Every model takes one whole step (forward, loss, backward, clip to 1.0,
fused AdamW) before the next one's turn, so that whatever else the machine does hits all of them. CPU-seconds of this
process are compared: minima, and medians of the ratio within a round.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from record import write_record
from torch import Tensor, nn

from lightning_lm.kernels import linear_cross_entropy
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a batch."""

    layers: int = 6
    d_model: int = 384
    heads: int = 6
    hidden: int = 1024
    context: int = 256
    vocab: int = 8192
    batch: int = 16


def our_model(shape: Shape) -> tuple[nn.Module, Loss]:
    layer = Layer(mixer=Attention(num_heads=shape.heads), ffn=GLU(hidden_size=shape.hidden))
    config = TransformerConfig(
        vocab_size=shape.vocab,
        d_model=shape.d_model,
        num_layers=shape.layers,
        layers=layer,
        context_length=shape.context,
    )

    def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        total = linear_cross_entropy(model.hidden(ids), model.head.weight, targets)
        return total.loss_sum / total.num_tokens

    return config.build(), loss


def transformers_model(shape: Shape) -> tuple[nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )

    def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets.flatten())

    return LlamaForCausalLM(config), loss


def litgpt_model(shape: Shape) -> tuple[nn.Module, Loss]:
    from litgpt import GPT, Config

    config = Config(
        block_size=shape.context,
        n_layer=shape.layers,
        n_embd=shape.d_model,
        n_head=shape.heads,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        intermediate_size=shape.hidden,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )

    def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())

    return GPT(config), loss


class Step:
    """A model with its loss and optimizer."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss = model.train(), loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def __call__(self, ids: Tensor, targets: Tensor) -> tuple[float, float]:
        """Train on a batch; return CPU-seconds and the loss."""
        start = time.process_time()
        loss = self.loss(self.model, ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start, loss.item()


def run(shape: Shape, rounds: int, names: list[str]) -> dict[str, object]:
    """Time the models in turns."""
    builders = {"lightning_lm": our_model, "transformers": transformers_model, "litgpt": litgpt_model}
    steps = {}
    for name in names:
        torch.manual_seed(0)
        steps[name] = Step(*builders[name](shape))
    times: dict[str, list[float]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(0)
    for round_number in range(rounds + 1):
        tokens = torch.randint(shape.vocab, (shape.batch, shape.context + 1), generator=generator)
        order = names if round_number % 2 else names[::-1]
        for name in order:
            seconds, loss = steps[name](tokens[:, :-1], tokens[:, 1:])
            if round_number:  # the first round warms up
                times[name].append(seconds)
            print(f"{round_number} {name:14s} {seconds:.3f} s  loss {loss:.3f}", flush=True)
    tokens_per_step = shape.batch * shape.context
    return {
        name: {
            "parameters": sum(p.numel() for p in steps[name].model.parameters()),
            "best_step_cpu_s": round(min(series), 4),
            "tokens_per_cpu_s": round(tokens_per_step / min(series), 1),
            "ours_over_this_median": round(
                statistics.median(a / b for a, b in zip(times[names[0]], series, strict=True)), 4
            ),
        }
        for name, series in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where the record goes; printed only where left out")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--models", nargs="+", default=["lightning_lm", "transformers", "litgpt"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape(layers=args.layers)
    results = run(shape, args.rounds, args.models)
    print(results)
    if args.output:
        command = shlex.join(["python", *sys.argv])
        write_record(args.output, command=command, results={"shape": vars(shape), "rounds": args.rounds, **results})


if __name__ == "__main__":
    main()
