"""What a rank holds, sends and waits for with 52M parameters on two ranks: DDP beside zero1 and zero2, in float32.

Ranks are processes on one machine over gloo. The strategies take turns, block by block, so that the machine's moods hit
all of them; times are CPU-bound and say what the sharding adds, not what a GPU gains. The last table is computed.

    python tests/benchmarks/bench_sharded_optimizer.py --output tests/benchmarks/results/sharded_optimizer.json
"""

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from record import free_port, write_record
from torch import distributed, nn

from lightning_lm.strategies import ShardedOptimizer, ShardedOptimizerStrategy
from lightning_lm.strategies.zero.partition import Placed, place

RANKS, WIDTH, LAYERS, VOCAB = 2, 1024, 12, 39_000
STRATEGIES = {
    "ddp": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "zero1": lambda: ShardedOptimizerStrategy(stage=1),
    "zero2": lambda: ShardedOptimizerStrategy(stage=2),
}


class Model(LightningModule):
    """Matrices of a transformer's sizes and an embedding: 52M parameters; attention would only add time."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.held = 0

    def training_step(self, batch, batch_idx):
        features = self.embedding(batch)
        for layer in self.layers:
            features = features + torch.tanh(layer(features))
        return features.square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    def on_before_optimizer_step(self, optimizer):
        if isinstance(optimizer, ShardedOptimizer) and self.trainer.strategy.stage == 2:
            gradients = optimizer.local_gradients()
        else:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
        storages = {gradient.untyped_storage().data_ptr(): gradient.untyped_storage() for gradient in gradients}
        self.held = sum(storage.nbytes() for storage in storages.values())


class Sent:
    """Counts what collectives are given, by kind, in bytes."""

    def __init__(self):
        self.bytes = defaultdict(int)
        self.before = {name: getattr(distributed, name) for name in ("isend", "reduce", "broadcast", "all_reduce")}

    def __enter__(self):
        for name, function in self.before.items():
            setattr(distributed, name, self.counting(name, function))
        return self

    def __exit__(self, *_):
        for name, function in self.before.items():
            setattr(distributed, name, function)

    def counting(self, name, function):
        def counted(tensor, *args, **kwargs):
            self.bytes[name] += tensor.nbytes
            return function(tensor, *args, **kwargs)

        return counted


class Steps:
    """The same batch again and again."""

    def __init__(self, count, tokens):
        self.count, self.batch = count, torch.arange(tokens) % VOCAB

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([self.batch] * self.count)


class Timed(Model):
    def __init__(self):
        super().__init__()
        self.times, self.cpu_times, self.started = [], [], (0.0, 0.0)

    def on_train_batch_start(self, batch, batch_idx):
        self.started = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.times.append(time.perf_counter() - self.started[0])
        self.cpu_times.append(time.process_time() - self.started[1])


def work(rank, port, folder, rounds, tokens):
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, RANKS, rank == 0, datetime.timedelta(seconds=300))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    times, facts = defaultdict(list), {}
    for _ in range(rounds):
        for name, strategy in STRATEGIES.items():
            measured, model = one_block(strategy(), tokens)
            times[name].append((statistics.median(model.times[1:]), statistics.median(model.cpu_times[1:])))
            facts[name] = measured
    torch.save((dict(times), facts), f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)


def one_block(strategy, tokens):
    torch.manual_seed(0)
    model = Timed()
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    found = {}

    def look(trainer, optimizer):
        state = [value for entry in optimizer.state.values() for value in entry.values() if value.dim() > 0]
        found["state_bytes"] = sum(value.nbytes for value in state)

    with Sent() as sent:
        model.on_train_end = lambda: look(trainer, trainer.strategy.optimizers[0])
        steps = Steps(5, tokens)
        trainer.fit(model, steps)
    total = sum(param.nbytes for param in model.parameters())
    start = total if getattr(strategy, "stage", 0) == 2 else 0  # weights of the first rank, once
    found |= {"parameter_bytes": total, "gradient_bytes": model.held}
    found["sent_bytes_per_step"] = {
        kind: (count - (start if kind == "broadcast" else 0)) / len(steps) for kind, count in sent.bytes.items()
    }
    if getattr(strategy, "stage", 0) < 2:  # torch's wrapper reduces in C++, where this cannot count: its payload is N
        found["sent_bytes_per_step"]["all_reduce in C++"] = total
    return found, model


def gpt2_balance():
    """Return the largest share of optimizer state over the mean, for GPT-2 (124M, tied)."""
    block = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    shapes = [(50257, 768), (1024, 768), *(12 * block), (768,), (768,)]
    table = {}
    for name, splits in (("whole parameters", False), ("large ones split by rows", True)):
        for ranks in (2, 4, 8, 16, 64):
            load = [0] * ranks
            place([Placed(shape, splits) for shape in shapes], ranks, load=load)
            table.setdefault(name, {})[ranks] = round(max(load) * ranks / sum(load), 3)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of five steps per strategy")
    parser.add_argument("--tokens", type=int, default=1024, help="per rank and step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        torch.multiprocessing.spawn(work, (port, folder, arguments.rounds, arguments.tokens), nprocs=RANKS)
        ranks = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(RANKS)]
    results = {"ranks": RANKS, "tokens_per_rank": arguments.tokens, "strategies": {}}
    times = ranks[0][0]
    for name in STRATEGIES:
        results["strategies"][name] = {"rank_facts": [facts[name] for _, facts in ranks]}
        for index, kind in enumerate(("wall", "cpu")):
            mine, ddp = ([pair[index] for pair in times[which]] for which in (name, "ddp"))
            ratios = [one / other for one, other in zip(mine, ddp, strict=True)]
            results["strategies"][name][f"step_{kind}_time_s"] = round(statistics.median(mine), 3)
            results["strategies"][name][f"step_{kind}_time_over_ddp"] = round(statistics.median(ratios), 3)
        facts = ranks[0][1][name]
        shares = [f"{facts[key] / facts['parameter_bytes']:.3f}" for key in ("gradient_bytes", "state_bytes")]
        sent = sum(facts["sent_bytes_per_step"].values()) / facts["parameter_bytes"]
        print(f"{name:6} gradients/N {shares[0]}  state/N {shares[1]}  payload/N {sent:.3f}", file=sys.stderr)
    results["load_1min"] = os.getloadavg()[0]
    results["gpt2_124m_largest_over_mean_state"] = gpt2_balance()
    print(results)
    if arguments.output:
        write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    main()
