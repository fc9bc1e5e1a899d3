"""Memory of a rank with 92M parameters on two CPU ranks: DDP, zero2, fully sharded; with and without glibc's heap.

Resident memory beyond that before the model is built, in MiB: the peak of a fit of four steps, and what is held at
the last step. Sharding gathers and frees whole layers. glibc keeps freed blocks below its mmap threshold, which grows
to 32 MiB by itself, in the heap, in pieces that the next gather does not fit; ``MALLOC_MMAP_THRESHOLD_=65536`` gives
every large block back to the system. An accelerator has an allocator of its own and no such effect.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_sharded_model_memory.py --output \
        tests/benchmarks/results/sharded_model_memory.json
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
from lightning.pytorch import Callback, Trainer
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent))
from record import free_port, write_record

RANKS, STEPS, VOCAB, TOKENS = 2, 4, 4096, 256
STRATEGIES = ("ddp", "zero2", "fully_sharded")
ALLOCATORS = {"glibc": {}, "mmap": {"MALLOC_MMAP_THRESHOLD_": "65536"}}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Peak(threading.Thread):
    """Largest resident memory, looked at every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib, self.going = 0.0, True

    def run(self) -> None:
        while self.going:
            self.mib = max(self.mib, resident_mib())
            time.sleep(0.002)


class Held(Callback):
    """Resident memory at the start of the last step, and CPU-seconds of the steps after the first."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.mib = resident_mib()
        if batch_idx == 1:
            self.start = time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.cpu_s = (time.process_time() - self.start) / (STEPS - 1) if batch_idx else 0.0


def strategy_of(name: str):
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_lm.strategies import ShardedModelStrategy, ShardedOptimizerStrategy

    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True)
    return ShardedOptimizerStrategy(stage=2) if name == "zero2" else ShardedModelStrategy()


def work(rank: int, port: int, name: str, width: int, layers: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, RANKS, rank == 0, datetime.timedelta(seconds=300))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
    from lightning_lm.modules import PretrainModule
    from lightning_lm.optim import AdamW

    before, peak, held = resident_mib(), Peak(), Held()
    layer = Layer(mixer=Attention(num_heads=8), ffn=GLU())
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=width, num_layers=layers, layers=layer, context_length=TOKENS, tie_embeddings=True
    )
    module = PretrainModule(config, optimizer=AdamW(lr=1e-4))
    ids = torch.randint(0, VOCAB, (2, TOKENS + 1))
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy_of(name),
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[held],
    )
    peak.start()
    trainer.fit(module, torch.utils.data.DataLoader([batch] * STEPS, batch_size=None))
    peak.going = False
    size = sum(parameter.numel() for parameter in module.parameters()) * 4 / 2**20
    if rank == 0:
        found = {"parameters": size, "peak": peak.mib - before, "held": held.mib - before, "step_cpu_s": held.cpu_s}
        print(json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)
    distributed.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--one", choices=STRATEGIES)
    args = parser.parse_args()
    if args.one:
        torch.multiprocessing.spawn(work, (free_port(), args.one, args.width, args.layers), nprocs=RANKS)
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    sizes = ["--width", str(args.width), "--layers", str(args.layers)]
    for allocator, environment in ALLOCATORS.items():
        for name in STRATEGIES:
            command = [sys.executable, __file__, "--one", name, *sizes]
            done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=os.environ | environment)
            found = next(line for line in done.stdout.splitlines() if line.startswith("{"))
            results.setdefault(allocator, {})[name] = json.loads(found)
            print(allocator, name, found, flush=True)
        of_ddp = {name: entry["held"] / results[allocator]["ddp"]["held"] for name, entry in results[allocator].items()}
        results[allocator]["held_beside_ddp"] = {name: round(ratio, 3) for name, ratio in of_ddp.items()}
    if args.output:
        write_record(args.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
