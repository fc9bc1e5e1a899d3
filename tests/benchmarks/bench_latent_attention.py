"""One token after a long text: latent attention beside that of transformers' DeepSeek-V3, and what the cache holds.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_latent_attention.py --output RECORD.json

CPU-seconds of this process on one thread; the ways take turns, and the best of the rounds counts. Whole models of two
layers are timed, and within them the attention alone.
"""

import argparse
import functools
import math
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from record import write_record
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.models.huggingface.config_json import config_from_huggingface
from lightning_lm.models.huggingface.families import FAMILIES
from lightning_lm.models.huggingface.renames import of_stack, renames_for
from lightning_lm.models.transformer import Transformer

HEADS, NOPE, ROPE, VALUES, RANK, LAYERS = 16, 64, 32, 64, 128, 2
CONFIG = DeepseekV3Config(
    vocab_size=512, hidden_size=512, intermediate_size=512, moe_intermediate_size=64, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=HEADS, n_routed_experts=4, num_experts_per_tok=1, n_group=1,
    topk_group=1, first_k_dense_replace=LAYERS, kv_lora_rank=RANK, q_lora_rank=None, qk_nope_head_dim=NOPE,
    qk_rope_head_dim=ROPE, v_head_dim=VALUES, max_position_embeddings=8192,
)  # fmt: skip


@torch.no_grad()
def ours_like(theirs: DeepseekV3ForCausalLM) -> Transformer:
    """Return our model with the weights of theirs."""
    config = config_from_huggingface(CONFIG.to_dict())
    model, state = config.build().eval(), theirs.state_dict()
    weights = dict(model.named_parameters())
    for entry in renames_for(FAMILIES["deepseek_v3"].names_for(config), weights, LAYERS):
        targets = [of_stack(name, weights) for name in entry.ours]
        for target, piece in zip(targets, entry.split(state[entry.theirs], [x.shape for x in targets]), strict=True):
            target.copy_(piece)
    return model


class Attending:
    """Times the attention layers of a model.

    Args:
        layers: Their ``forward`` is replaced by one that is timed.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.seconds = 0.0
        for layer in layers:
            layer.forward = functools.partial(self._timed, layer.forward)

    def _timed(self, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        began = time.process_time()
        result = forward(*given, **named)
        self.seconds += time.process_time() - began
        return result


def measured(steps: dict[str, Callable[[], object]], inner: dict[str, Attending], rounds: int) -> dict[str, float]:
    """Return the best ms of whole passes, and of the attention in them."""
    whole, attention = dict.fromkeys(steps, math.inf), dict.fromkeys(steps, math.inf)
    for _ in range(rounds):
        for name, step in steps.items():
            inner[name].seconds, began = 0.0, time.process_time()
            step()
            whole[name] = min(whole[name], time.process_time() - began)
            attention[name] = min(attention[name], inner[name].seconds)
    found = {name: round(1e3 * value, 2) for name, value in whole.items()}
    return found | {f"{name}, attention alone": round(1e3 * value, 2) for name, value in attention.items()}


def our_step(model: Transformer, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a pass over the last token, after which it is forgotten."""
    cache = model.make_cache(1, ids.size(1))
    model(ids[:, :-1], cache=cache)

    def step() -> torch.Tensor:
        logits = model(ids[:, -1:], cache=cache)
        cache.rewind(1)
        return logits

    return step


def their_step(model: DeepseekV3ForCausalLM, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return the same of theirs."""
    cache = DynamicCache(config=CONFIG)
    model(ids[:, :-1], cache=cache, use_cache=True)

    def step() -> torch.Tensor:
        logits = model(ids[:, -1:], cache=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step


@torch.no_grad()
def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = DeepseekV3ForCausalLM(CONFIG).eval()
    ours = ours_like(theirs)
    plain = Layer(mixer=Attention(num_heads=HEADS, head_dim=NOPE + ROPE))
    heads = TransformerConfig(vocab_size=512, d_model=512, num_layers=LAYERS, layers=plain).build().eval()
    inner = {
        "latent": Attending([block.mixer for block in ours.layers]),
        "transformers": Attending([layer.self_attn for layer in theirs.model.layers]),
        "multi-head": Attending([block.mixer for block in heads.layers]),
    }
    results = {}
    for length in (512, 2048, 4096):
        ids = torch.randint(512, (1, length))
        steps = {
            "latent": our_step(ours, ids),
            "transformers": their_step(theirs, ids),
            "multi-head": our_step(heads, ids),
        }
        torch.testing.assert_close(steps["latent"](), steps["transformers"](), atol=1e-4, rtol=0)
        found = measured(steps, inner, options.rounds)
        ratios = {
            f"times faster{end}": round(found[f"transformers{end}"] / found[f"latent{end}"], 1)
            for end in ("", ", attention alone")
        }
        results[str(length)] = found | ratios
    held = {"latent": RANK + ROPE, "multi-head": 2 * HEADS * (NOPE + ROPE)}
    write_record(
        options.output,
        command=shlex.join(["python", *sys.argv]),
        results={
            "ms_per_token_by_length": results,
            "numbers_held_per_token_and_layer": held | {"ratio": round(held["latent"] / held["multi-head"], 3)},
        },
    )


if __name__ == "__main__":
    main()
