"""One step of data parallel by four ways to exchange gradients, on two ranks over gloo on one machine.

naive: one all-reduce a parameter after the backward pass; flat: one for all; bucketed: 5 MiB buckets while the backward
pass goes on; ddp: torch's own wrapper with buckets of the same size. The ways take turns, step by step.

    python tests/benchmarks/bench_data_parallel.py --output tests/benchmarks/results/data_parallel.json
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
from record import write_record
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lm.strategies.data_parallel import GradientAverager

RANKS, BUCKET_BYTES = 2, 5 * 2**20
WAYS = ("naive", "flat", "bucketed", "ddp")


def model() -> nn.Module:
    """Narrow and deep, with many small parameters, as language models are: 8.6M parameters in 130 tensors."""
    torch.manual_seed(0)
    blocks = [layer for _ in range(32) for layer in (nn.LayerNorm(512), nn.Linear(512, 512), nn.Tanh())]
    return nn.Sequential(*blocks, nn.Linear(512, 256))


def one_step(way, network, averager, rows) -> float:
    network.zero_grad()
    start = time.perf_counter()
    loss = network(rows).square().mean()
    if averager is not None:
        averager.begin()
    loss.backward()
    if averager is not None:
        averager.finish()
    return time.perf_counter() - start


def work(rank, folder, steps, rows_per_rank):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    networks = {way: model() for way in WAYS}
    averagers = {
        way: GradientAverager(networks[way].parameters(), communication=way, bucket_bytes=BUCKET_BYTES)
        for way in WAYS[:3]
    }
    networks["ddp"] = DistributedDataParallel(
        networks["ddp"], bucket_cap_mb=BUCKET_BYTES / 2**20, gradient_as_bucket_view=True
    )
    rows = torch.randn(rows_per_rank, 512, generator=torch.Generator().manual_seed(rank))
    times = defaultdict(list)
    for _ in range(steps):
        for way in WAYS:
            distributed.barrier()
            times[way].append(one_step(way, networks[way], averagers.get(way), rows))
    wanted = [param.grad for param in networks["ddp"].parameters()]
    for way in WAYS[:3]:
        for mine, theirs in zip(networks[way].parameters(), wanted, strict=True):
            torch.testing.assert_close(mine.grad, theirs)
    torch.save(dict(times), f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=512, help="per rank and step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, arguments.steps, arguments.rows), nprocs=RANKS)
        times = torch.load(f"{folder}/0.pt", weights_only=True)
    ddp = times["ddp"][2:]
    results = {
        way: {
            "step_time_s": round(statistics.median(times[way][2:]), 4),
            "over_ddp_median_of_pairs": round(
                statistics.median(mine / theirs for mine, theirs in zip(times[way][2:], ddp, strict=True)), 3
            ),
        }
        for way in WAYS
    }
    results |= {
        "ranks": RANKS,
        "rows_per_rank": arguments.rows,
        "steps": arguments.steps,
        "load_1min": os.getloadavg()[0],
    }
    print(results)
    if arguments.output:
        write_record(arguments.output, command=f"python {' '.join(sys.argv)}", results=results)


if __name__ == "__main__":
    main()
