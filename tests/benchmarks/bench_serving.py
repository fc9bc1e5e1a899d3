"""16 clients with mixed lengths: the serving engine against one by one and against static batches, and its memory.

Each client sends its next request when the last one is answered. All three ways compute the same greedy tokens over one
model of 10 M parameters, without HTTP; they take turns, and the least CPU time of each counts.

    python tests/benchmarks/bench_serving.py --output tests/benchmarks/results/serving.json
"""

import argparse
import gc
import random
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
from record import cpu_seconds, write_record

from lightning_lm.generation import Generator, Sampling
from lightning_lm.generation.decoding_loop import StopConditions
from lightning_lm.models import GLU, Attention, Layer, Rope, TransformerConfig
from lightning_lm.serving import Engine, GenerationRequest
from lightning_lm.tokenizers import ByteTokenizer

CLIENTS, VOCAB = 16, 257
GREEDY = Sampling(temperature=0)
TOKENIZER = ByteTokenizer(())


def model_of():
    layers = Layer(mixer=Attention(num_heads=6, rope=Rope()), ffn=GLU())
    config = TransformerConfig(vocab_size=VOCAB, d_model=384, num_layers=6, context_length=1024, layers=layers)
    return config.build().eval()


def requests_of(per_client, seed=0):
    """Return prompts of 8 to 200 tokens with 8 to 160 new ones, for each client."""
    source = random.Random(seed)

    def one():
        return [source.randrange(256) for _ in range(source.randint(8, 200))], source.randint(8, 160)

    return [[one() for _ in range(per_client)] for _ in range(CLIENTS)]


class Client:
    """Sends its requests one after the other, and notes the time to each first token. Seconds."""

    def __init__(self, engine, requests, finished):
        self.engine, self.requests, self.finished = engine, list(requests), finished
        self.waits, self.tokens = [], 0
        self.send()

    def send(self):
        if not self.requests:
            self.finished.release()
            return
        prompt, count = self.requests.pop(0)
        self.begun, self.first = time.monotonic(), True
        ends = StopConditions(count, None, frozenset())
        self.engine.submit(GenerationRequest(prompt_ids=tuple(prompt), deliver=self.take, ends=ends))

    def take(self, update):
        assert update.error is None
        if self.first:
            self.waits.append(time.monotonic() - self.begun)
            self.first = False
        self.tokens += len(update.token_ids)
        if update.is_last:
            self.send()


def continuous(model, requests, waits):
    finished = threading.Semaphore(0)
    with Engine(model, TOKENIZER, max_batch=CLIENTS).running() as engine:
        clients = [Client(engine, of_client, finished) for of_client in requests]
        for _ in clients:
            finished.acquire()
    waits.extend(wait for client in clients for wait in client.waits)
    return sum(client.tokens for client in clients)


def static(model, requests):
    """Rounds of one request of each client; a batch is over when its longest completion is, as rows cannot join."""
    for batch in zip(*requests, strict=True):
        generator = Generator(model, TOKENIZER)
        generator.generate([p for p, _ in batch], sampling=GREEDY, max_new_tokens=max(count for _, count in batch))


def one_by_one(model, requests):
    generator = Generator(model, TOKENIZER)
    for of_client in requests:
        for prompt, count in of_client:
            generator.generate([prompt], sampling=GREEDY, max_new_tokens=count)


def held_bytes():
    """Return the memory of all tensors that are alive in this process. Bytes."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    storages = [found.untyped_storage() for found in gc.get_objects() if type(found) in kinds]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cancellations(model, count):
    """Return the bytes of all tensors after each fifth of many requests, most of them given up at a random place.

    Without the prefix cache, which keeps memory on purpose. The resident memory of a process would also count what its
    allocator keeps for later.
    """
    source, measured = random.Random(1), []
    with Engine(model, TOKENIZER, max_batch=CLIENTS, max_waiting=count, prefix_bytes=0).running() as engine:
        for _ in range(5):
            left = threading.Semaphore(0)
            for _ in range(count // 5):
                request = GenerationRequest(
                    prompt_ids=tuple(source.randrange(256) for _ in range(source.randint(8, 120))),
                    deliver=lambda update: None,
                    ends=StopConditions(source.randint(1, 40), None, frozenset()),
                )
                seen = [source.randint(1, 20)]

                def deliver(update, request=request, seen=seen, left=left):
                    seen[0] -= 1
                    if seen[0] == 0:
                        request.is_cancelled = True
                    if seen[0] == 0 or (update.is_last and seen[0] > 0):
                        left.release()

                request.deliver = deliver
                engine.submit(request)
            for _ in range(count // 5):
                left.acquire()
            engine.change(lambda: None)  # runs once no row is left
            measured.append(held_bytes())
    return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--per-client", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, requests, waits = model_of(), requests_of(arguments.per_client), []
    ways = {
        "continuous": lambda: continuous(model, requests, waits),
        "static": lambda: static(model, requests),
        "one_by_one": lambda: one_by_one(model, requests),
    }
    times = cpu_seconds(ways, lambda name: ways[name](), arguments.rounds)
    tokens = sum(count for of_client in requests for _, count in of_client)
    speed = {name: round(tokens / min(seconds), 1) for name, seconds in times.items()}
    results = {
        "tokens": tokens,
        "tokens_per_cpu_second": speed,
        "times_one_by_one": round(speed["continuous"] / speed["one_by_one"], 2),
        "times_static": round(speed["continuous"] / speed["static"], 2),
        "first_token_s": {
            "median": round(statistics.median(waits), 3),
            "p95": round(statistics.quantiles(waits, n=20)[-1], 3),
        },
        "bytes_of_tensors_while_500_requests_are_cancelled": cancellations(model, 500),
    }
    print(results, flush=True)
    if arguments.output:
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
