"""Recurrent mixers against transformers' own and softmax attention: training, growth with the length, decoding.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_recurrent.py --output tests/benchmarks/results/recurrent.json

CPU-seconds of this process on one thread; the ways take turns, and the best of the rounds counts.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping

import torch
from record import write_record
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from lightning_lm.functional.attention import causal_attention
from lightning_lm.functional.linear_recurrence import linear_recurrence
from lightning_lm.models import SSD, Attention, GatedDeltaNet, Layer, RMSNorm, TransformerConfig
from lightning_lm.models.recurrent.layers import unit_length

HEADS, HEAD_DIM = 4, 64


def timed(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the best CPU time of each way in ms."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - began)
    return {name: round(1e3 * seconds, 2) for name, seconds in best.items()}


def inputs(length: int) -> list[Tensor]:
    """Return queries, keys, values, logarithms of decays and writing strengths."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))
    return [q, k, v, (-torch.rand(1, length, HEADS)).requires_grad_(), torch.rand(1, length, HEADS).requires_grad_()]


def trained(run: Callable[..., Tensor], given: list[Tensor]) -> Callable[[], object]:
    """Return a forward and a backward pass."""
    return lambda: torch.autograd.grad(run(*given).sum(), given, allow_unused=True)


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Run the gated delta rule."""
    return linear_recurrence(unit_length(q) * HEAD_DIM**-0.5, unit_length(k), v, g, beta=beta)[0]


def theirs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Run that of transformers, which it takes without flash-linear-attention."""
    return torch_chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]


def softmax(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """Run softmax attention."""
    return causal_attention(*(x.transpose(1, 2) for x in (q, k, v)))


def mamba_layers(length: int) -> dict[str, Callable[[], object]]:
    """Return whole Mamba-2 mixers with the same sizes, ours and transformers', forward and backward."""
    torch.manual_seed(0)
    config = Mamba2Config(hidden_size=256, num_heads=8, head_dim=64, state_size=64, n_groups=1, chunk_size=64)
    mixers = {
        "ours": SSD(head_dim=64, state=64).build(256, norm=RMSNorm(eps=1e-5)),
        "transformers": Mamba2Mixer(config, layer_idx=0),
    }
    x = torch.randn(1, length, 256)

    def step(mixer: torch.nn.Module) -> None:
        mixer.zero_grad()
        mixer(x).sum().backward()

    return {name: lambda mixer=mixer: step(mixer) for name, mixer in mixers.items()}


@torch.no_grad()
def decoding(mixer: object, seen: int, rounds: int) -> float:
    """Return ms for a token of a model of four layers after some text."""
    layer = Layer(mixer=mixer, ffn=None)
    model = TransformerConfig(vocab_size=256, d_model=256, num_layers=4, layers=layer).build().eval()
    cache = model.make_cache(1, seen + 20 * rounds)
    for part in torch.randint(256, (1, seen)).split(2048, 1):
        model(part, cache=cache)
    token = torch.zeros(1, 1, dtype=torch.int64)

    def tokens() -> None:
        for _ in range(20):
            model(token, cache=cache)

    return round(timed({"": tokens}, rounds)[""] / 20, 3)


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = inputs(2048)
    torch.testing.assert_close(ours(*given), theirs(*given), atol=1e-4, rtol=0)
    delta = timed({"ours": trained(ours, given), "transformers": trained(theirs, given)}, options.rounds)
    ssd = timed(mamba_layers(2048), options.rounds)
    growth = {}
    for length in (1024, 2048, 4096, 8192, 16384):
        ways = {
            "gated delta rule": trained(ours, inputs(length)),
            "softmax attention": trained(softmax, inputs(length)),
        }
        growth[str(length)] = timed(ways, 2)
    mixers = {"gated delta net": GatedDeltaNet(num_heads=4), "attention": Attention(num_heads=4)}
    lengths = (1024, 4096, 8192)
    write_record(
        options.output,
        command=shlex.join(["python", *sys.argv]),
        results={
            "gated_delta_rule_2048_ms": delta | {"ratio": round(delta["ours"] / delta["transformers"], 3)},
            "mamba2_mixer_2048_ms": ssd | {"ratio": round(ssd["ours"] / ssd["transformers"], 3)},
            "forward_backward_ms_by_length": growth,
            "decoding_ms_per_token_by_length": {
                name: {str(seen): decoding(mixer, seen, 3) for seen in lengths} for name, mixer in mixers.items()
            },
        },
    )


if __name__ == "__main__":
    main()
