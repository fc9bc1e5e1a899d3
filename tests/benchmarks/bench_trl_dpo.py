"""DPO beside TRL's DPOTrainer: CPU-seconds a pair and positions fed, one thread, in one process.

Both train the same model of 7.5M parameters (tied embeddings, as a Llama for TRL) on the same ragged pairs: prompts of
16 to 128 tokens, completions of 8 to 64. Loss (sigmoid, beta 0.1), reference (a frozen copy), AdamW (1e-5, no decay),
clipping and 16 pairs an optimizer step are the same; TRL draws them in its own order. The first step is left out. Which
trainer begins changes from round to round; ratios are taken within rounds. TRL's ``padding_free`` needs FlashAttention,
which no CPU has.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_trl_dpo.py --output tests/benchmarks/results/trl_dpo.json
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
import trl
from lightning.pytorch import Callback, Trainer
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from record import write_record

from lightning_lm.data import EncodedPair, PairStream, PreferencePairs
from lightning_lm.datamodules.loader import DataShard, Loading, TrainLoader
from lightning_lm.models import GLU, Attention, Layer, Transformer, TransformerConfig, save_huggingface
from lightning_lm.modules import DPOModule
from lightning_lm.optim import AdamW, Constant

STEP = 16
"""Pairs of an optimizer step."""
VOCAB, EOS = 4096, 0
LEARNING_RATE, BETA = 1e-5, 0.1
Pair = tuple[list[int], list[int], list[int]]


def pairs_of(count: int, seed: int) -> list[Pair]:
    """Return prompts with two completions each, as ids."""
    generator = random.Random(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return [generator.randrange(1, VOCAB) for _ in range(generator.randint(shortest, longest))]

    return [(ids(16, 128), [*ids(8, 64), EOS], [*ids(8, 64), EOS]) for _ in range(count)]


def small_model() -> Transformer:
    torch.manual_seed(0)
    layers = Layer(mixer=Attention(num_heads=4), ffn=GLU())
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=256, num_layers=8, layers=layers, context_length=512, tie_embeddings=True
    )
    return config.build()


class Clock:
    """CPU-seconds of the steps after the first, and the positions that the policy was fed in all of them."""

    def __init__(self, embedding: nn.Module) -> None:
        self.times: list[float] = []
        self.fed = 0
        embedding.register_forward_hook(self._count)

    def _count(self, _module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        self.fed += args[0].numel()

    def tick(self) -> None:
        self.times.append(time.process_time())

    def result(self, pairs: int) -> dict[str, float]:
        steps = [end - begin for begin, end in zip(self.times, self.times[1:], strict=False)]
        return {
            "pairs_per_cpu_s": round(STEP / statistics.median(steps), 3),
            "best_pairs_per_cpu_s": round(STEP / min(steps), 3),
            "positions_per_pair": round(self.fed / pairs, 1),
        }


def ours(pairs: list[Pair]) -> dict[str, float]:
    class Measured(Callback):
        def on_fit_start(self, trainer, module):
            self.clock = Clock(module.model.embed)  # the reference is a copy made before

        def on_train_batch_end(self, *_):
            self.clock.tick()

    measured = Measured()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=len(pairs) // STEP,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[measured],
    )
    encoded = PreferencePairs(EncodedPair(*pair, margin=0.0, is_cut=False) for pair in pairs)
    loader = TrainLoader(PairStream(encoded), DataShard(STEP), lambda: 0, Loading())
    module = DPOModule(small_model(), optimizer=AdamW(lr=LEARNING_RATE, weight_decay=0.0), schedule=Constant())
    trainer.fit(module, loader)
    return measured.clock.result(len(pairs))


def theirs(pairs: list[Pair]) -> dict[str, float]:
    def text(ids: list[int]) -> str:
        return "".join(f" t{id}" for id in ids if id != EOS)

    class Measured(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.tick()

    records = [dict(zip(("prompt", "chosen", "rejected"), map(text, pair), strict=True)) for pair in pairs]
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(small_model(), folder)
        model, reference = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
        )
        clock = Clock(model.get_input_embeddings())
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=reference,
            args=arguments_of(folder, len(pairs) // STEP),
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=word_tokenizer(),
            callbacks=[Measured()],
        )
        trainer.train()
    return clock.result(len(pairs))


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer in which the word t7 is the id 7."""
    words = {"<eos>": EOS} | {f"t{id}": id for id in range(1, VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def arguments_of(folder: str, steps: int) -> trl.DPOConfig:
    return trl.DPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=STEP,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1000,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = []
    for index in range(args.rounds):
        pairs, contenders = pairs_of(args.pairs, seed=index), {"lightning_lm": ours, "trl": theirs}
        order = list(contenders) if index % 2 == 0 else list(reversed(contenders))
        found = {name: contenders[name](pairs) for name in order}
        distinct = sum(map(len, (part for pair in pairs for part in pair))) / len(pairs)
        rounds.append({"distinct_tokens_per_pair": round(distinct, 1), **found})
        print(rounds[-1], flush=True)
    results = {
        "parameters": sum(parameter.numel() for parameter in small_model().parameters()),
        "rounds": rounds,
        "median_speed_over_trl": round(
            statistics.median(
                entry["lightning_lm"]["pairs_per_cpu_s"] / entry["trl"]["pairs_per_cpu_s"] for entry in rounds
            ),
            2,
        ),
        "best_pairs_per_cpu_s": {
            name: max(entry[name]["best_pairs_per_cpu_s"] for entry in rounds) for name in ("lightning_lm", "trl")
        },
        "median_positions_over_distinct_tokens": {
            name: round(
                statistics.median(
                    entry[name]["positions_per_pair"] / entry["distinct_tokens_per_pair"] for entry in rounds
                ),
                3,
            )
            for name in ("lightning_lm", "trl")
        },
    }
    print({name: value for name, value in results.items() if name != "rounds"})
    write_record(args.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
