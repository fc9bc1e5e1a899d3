"""Greedy decoding with drafts of which a given share is kept, beside decoding without.

The draft costs what a small model does, and says what the large one would say except at a share of places drawn
beforehand. One thread, CPU time; the ways take turns in one process.

    python tests/benchmarks/bench_speculation.py --output tests/benchmarks/results/speculation.json
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from record import cpu_seconds, write_record
from torch import Tensor, nn

from lightning_lm.generation import Generator, Sampling, Speculation
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig

VOCAB, PROMPT, NEW = 8192, 64, 128
GREEDY = Sampling(temperature=0)


def model_of(d_model: int, num_layers: int, num_heads: int) -> nn.Module:
    layer = Layer(mixer=Attention(num_heads=num_heads), ffn=GLU())
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=d_model, num_layers=num_layers, layers=layer, context_length=256
    )
    return config.build().eval()


class Draft(nn.Module):
    """Runs a small model, and then says what stands in a table of texts."""

    def __init__(self, small: nn.Module, texts: Tensor) -> None:
        super().__init__()
        self.small, self.texts = small, texts

    def make_cache(self, *arguments: Any, **options: Any) -> Any:
        self.rows = torch.arange(len(self.texts))
        cache = self.small.make_cache(*arguments, **options)
        select = cache.select

        def select_texts_too(rows: Tensor) -> None:
            self.rows = self.rows[rows]
            select(rows)

        cache.select = select_texts_too
        return cache

    def forward(self, ids: Tensor, *, cache: Any) -> Tensor:
        ends = cache.length if cache.ends is None else cache.ends[:, None]
        next_columns = (torch.arange(ids.shape[1]) + 1 + ends).expand(len(ids), -1)
        logits = self.small(ids, cache=cache).zero_()
        said = self.texts[self.rows[:, None], next_columns]
        return logits.scatter_(2, said[:, :, None], 1.0)


def measure(target: nn.Module, small: nn.Module, rows: int, share: float, rounds: int) -> dict[str, float]:
    prompts = torch.randint(1, VOCAB, (rows, PROMPT))
    plain = Generator(target)
    options = {"sampling": GREEDY, "max_new_tokens": NEW}
    answers = plain.generate(prompts.tolist(), **options)
    texts = torch.cat([prompts, torch.tensor([answer.token_ids for answer in answers])], dim=1)
    texts = torch.where(torch.rand(texts.shape) < share, texts, (texts + 1) % VOCAB)
    texts = nn.functional.pad(texts, (0, 8))
    drafted = Generator(target, speculation=Speculation(draft=Draft(small, texts)))

    def run(generator: Generator) -> None:
        found = generator.generate(prompts.tolist(), **options)
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in answers]

    seconds = cpu_seconds((plain, drafted), run, rounds)
    ratios = [without / with_drafts for without, with_drafts in zip(*seconds.values(), strict=True)]
    return {
        "best_cpu_s_without": round(min(seconds[plain]), 3),
        "best_cpu_s": round(min(seconds[drafted]), 3),
        "median_speed_over_without": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--shares", type=float, nargs="+", default=(0.0, 0.5, 0.8, 0.95))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    target, small = model_of(384, 6, 6), model_of(128, 1, 2)
    results = {}
    for rows in arguments.rows:
        for share in arguments.shares:
            key = f"batch {rows}, {round(100 * share)} % kept"
            results[key] = measure(target, small, rows, share, arguments.rounds)
            print(key, results[key], flush=True)
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
