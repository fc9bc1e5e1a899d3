"""How many steps Muon needs to reach the loss that AdamW ends with, on the quickstart's model and text.

Both are tuned over a grid of learning rates, at AdamW's number of steps and at 0.75 times that for Muon. Every run is
kept in the record; a run that is already there is not repeated.

    python tests/benchmarks/bench_optimizers.py --output tests/benchmarks/results/optimizers.json
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from record import write_record

from lightning_lm.cli.config.defaults import fast_precision
from lightning_lm.datamodules import TextDataModule
from lightning_lm.models import Attention, Layer, TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import WSD, AdamW, Muon, OptimizerPart

ADAMW_RATES = (5e-4, 1e-3, 2e-3)
MUON_RATES = (0.01, 0.02, 0.04)
MUON_ADAMW_RATES = (6e-3,)


def train(optimizer: OptimizerPart, steps: int, seed: int) -> dict[str, float]:
    """Train the quickstart's model and return its validation loss, in nats per token."""
    seed_everything(seed, verbose=False)
    config = TransformerConfig(
        d_model=256, num_layers=4, context_length=256, layers=Layer(mixer=Attention(num_heads=4))
    )
    module = PretrainModule(config, optimizer=optimizer, schedule=WSD(warmup=0.02, decay=0.4))
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        precision=fast_precision("cpu"),
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = TextDataModule(seed=seed)
    start = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - start
    trainer.limit_val_batches = 1.0
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    return {"val_loss": metrics["val/loss"], "cpu_seconds": seconds}


def main() -> None:
    """Run what the record lacks, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200, help="steps of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.output.read_text())["results"] if args.output.exists() else {}
    fewer = round(0.75 * args.steps)
    plan: dict[str, tuple[OptimizerPart, int]] = {}
    for rate in ADAMW_RATES:
        plan[f"adamw lr={rate:g} steps={args.steps}"] = AdamW(lr=rate), args.steps
    for rate in MUON_RATES:
        for other in MUON_ADAMW_RATES:
            plan[f"muon lr={rate:g} adamw_lr={other:g} steps={fewer}"] = Muon(lr=rate, adamw=AdamW(lr=other)), fewer
    for name, (optimizer, steps) in plan.items():
        if name not in results:
            results[name] = train(optimizer, steps, args.seed)
            print(name, results[name], flush=True)
            write_record(args.output, command=" ".join(["python", *sys.argv]), results=results)
    best = {
        kind: min(r["val_loss"] for n, r in results.items() if n.startswith(f"{kind} ")) for kind in ("adamw", "muon")
    }
    results["summary"] = {
        "adamw_best_val_loss": best["adamw"],
        f"muon_best_val_loss_at_{fewer / args.steps:g}x_steps": best["muon"],
        "muon_reaches_adamw": best["muon"] <= best["adamw"],
    }
    write_record(args.output, command=" ".join(["python", *sys.argv]), results=results)
    print(json.dumps(results["summary"], indent=2))


if __name__ == "__main__":
    main()
