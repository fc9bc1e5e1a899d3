"""What must work on a GPU and no other benchmark runs: one check a name, each with a record.

    python tests/benchmarks/bench_gpu_checks.py swap --output swap.json

* ``swap``: a Llama trains as many steps with `KernelSwap` as without it; losses and speed of both.
* ``fp16``: ``16-mixed`` with a gradient scaler; losses and the scale at the end.
* ``generate``: tokens per second of generation, greedy and sampled, one row and many.
* ``grpo``: a rollout of GRPO and the optimizer step on it.
* ``nccl``: ddp, zero1, zero2 and fsdp2 with one rank, over NCCL on a GPU and gloo elsewhere.

Without a GPU, or with ``--small``, models are small and times mean nothing: that is to see that everything runs.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from record import write_record
from torch.utils.data import DataLoader

from lightning_lm.callbacks import KernelSwap
from lightning_lm.data import ReverseDigits
from lightning_lm.datamodules import PromptDataModule
from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.modules import GRPOModule, PretrainModule, RolloutPlan
from lightning_lm.optim import AdamW, Constant
from lightning_lm.rewards import ExactAnswer
from lightning_lm.tokenizers import CharacterTokenizer

ON_GPU = torch.cuda.is_available()
TOKENIZER = CharacterTokenizer("0123456789=")


def llama(*, small: bool, vocab_size: int | None = None) -> TransformerConfig:
    heads = Attention(num_heads=2, num_kv_heads=1) if small else Attention(num_heads=12, num_kv_heads=4)
    width, depth, length, ids = (32, 2, 32, 96) if small else (768, 12, 2048, 50_304)
    return TransformerConfig(
        vocab_size=vocab_size or ids,
        d_model=width,
        num_layers=depth,
        context_length=length,
        layers=Layer(mixer=heads, ffn=GLU()),
    )


class Meter(Callback):
    """Keeps the loss and the time of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends_s: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))  # waits for the device
        self.ends_s.append(time.perf_counter())

    def found(self, tokens: int) -> dict[str, Any]:
        steps = [late - early for early, late in zip(self.ends_s[1:], self.ends_s[2:], strict=False)]
        speed = tokens / statistics.median(steps) if steps else 0.0
        return {"losses": [round(loss, 5) for loss in self.losses], "tokens_per_s": round(speed, 1)}


def trained(config: TransformerConfig, *callbacks: Callback, steps: int, rows: int, **options: Any) -> tuple[Any, Any]:
    """Train on random ids, the same in every call; return the Trainer and what was measured."""
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size or 0, (steps, rows, config.context_length + 1))
    batches = [{"input_ids": row, "labels": row} for row in ids]
    meter = Meter()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="gpu" if ON_GPU else "cpu",
        devices=1,
        max_steps=steps,
        callbacks=[*callbacks, meter],
        use_distributed_sampler=False,
        **quiet,
        **options,
    )
    module = PretrainModule(config, optimizer=AdamW(lr=1e-4), schedule=Constant())
    trainer.fit(module, DataLoader(batches, batch_size=None))
    found = meter.found(rows * config.context_length)
    if not all(map(torch.isfinite, torch.tensor(found["losses"]))):
        raise RuntimeError(f"The losses are not finite: {found['losses']}.")
    return trainer, found


def check_swap(*, small: bool) -> dict[str, Any]:
    config, steps, rows = llama(small=small), 3 if small else 10, 2 if small else 8
    precision = "bf16-mixed"
    _, plain = trained(config, steps=steps, rows=rows, precision=precision)
    _, swapped = trained(config, KernelSwap(), steps=steps, rows=rows, precision=precision)
    apart = max(abs(a - b) for a, b in zip(plain["losses"], swapped["losses"], strict=True))
    if apart > 0.05:
        raise RuntimeError(f"With kernels the losses are up to {apart:.4f} from those without: {plain}, {swapped}.")
    return {"plain": plain, "swapped": swapped, "largest_difference": apart}


def check_fp16(*, small: bool) -> dict[str, Any]:
    config, rows = llama(small=small), 2 if small else 8
    scaled: dict[str, Any] = {"precision": "16-mixed"}
    if not ON_GPU:  # Lightning would take bfloat16 instead
        scaled = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    trainer, found = trained(config, steps=4 if small else 20, rows=rows, **scaled)
    scale = trainer.precision_plugin.scaler.get_scale()
    if not 0 < scale < float("inf"):
        raise RuntimeError(f"The gradient scaler ended at {scale}.")
    return {**found, "scale": scale}


def check_generate(*, small: bool) -> dict[str, Any]:
    config = llama(small=small)
    device, new = torch.device("cuda" if ON_GPU else "cpu"), 8 if small else 128
    torch.manual_seed(0)
    model = config.build().to(device, torch.bfloat16 if ON_GPU else torch.float32).eval()
    generator, found = Generator(model), {}
    for rows in (1, 4 if small else 64):
        prompts = torch.randint(config.vocab_size or 0, (rows, 16)).tolist()
        for name, sampling in (("greedy", Sampling(temperature=0.0)), ("sampled", Sampling(seed=0))):
            generator.generate(prompts, sampling=sampling, max_new_tokens=new)
            begin_s = time.perf_counter()
            completions = generator.generate(prompts, sampling=sampling, max_new_tokens=new)
            tokens = sum(len(completion.token_ids) for completion in completions)
            found[f"{name}, {rows} rows, tokens/s"] = round(tokens / (time.perf_counter() - begin_s), 1)
    return found


def check_grpo(*, small: bool) -> dict[str, Any]:
    config = llama(small=small, vocab_size=TOKENIZER.vocab_size)
    prompts, samples = (2, 2) if small else (32, 16)
    plan = RolloutPlan(samples_per_prompt=samples, max_new_tokens=7)
    module = GRPOModule(config, rewards=[ExactAnswer()], plan=plan)
    data = PromptDataModule(ReverseDigits(num_examples=4 * prompts), None, tokenizer=TOKENIZER, batch_size=prompts)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="gpu" if ON_GPU else "cpu", devices=1, max_steps=2, precision="bf16-mixed", **quiet)
    begin_s = time.perf_counter()
    trainer.fit(module, datamodule=data)
    return {"completions": prompts * samples * 2, "seconds of two rollouts": round(time.perf_counter() - begin_s, 2)}


def check_nccl(*, small: bool) -> dict[str, Any]:
    config, rows, found = llama(small=small), 2 if small else 4, {}
    for strategy in ("ddp", "zero1", "zero2", "fsdp2"):
        _, found[strategy] = trained(config, steps=3, rows=rows, precision="bf16-mixed", strategy=strategy)
        if torch.distributed.is_initialized():
            found[strategy]["backend"] = torch.distributed.get_backend()
    return found


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "swap": check_swap,
    "fp16": check_fp16,
    "generate": check_generate,
    "grpo": check_grpo,
    "nccl": check_nccl,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checks", nargs="+", choices=list(CHECKS))
    parser.add_argument("--output", type=Path, required=True, help="where the record goes, after every check")
    parser.add_argument("--small", action="store_true", default=not ON_GPU, help="tiny models: a rehearsal")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "tests/benchmarks/bench_gpu_checks.py", *(sys.argv[1:] if argv is None else argv)])
    results: dict[str, Any] = {}
    failed = []
    for name in arguments.checks:
        try:
            results[name] = CHECKS[name](small=arguments.small)
        except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
            failed.append(name)
        print(f"{name}: {results[name]}", flush=True)
        write_record(arguments.output, command=command, results=results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
