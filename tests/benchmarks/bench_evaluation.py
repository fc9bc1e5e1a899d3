"""Five-shot likelihoods and completions of one exported model, beside lm-evaluation-harness with its `hf` model.

The same folder, texts and batch size, one thread, CPU time; the two take turns in one process and their answers are
compared. The model is small and untrained, so more of the time is overhead than with a real one.

    python tests/benchmarks/bench_evaluation.py --output tests/benchmarks/results/evaluation.json
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import cpu_seconds, write_record

from lightning_lm.data import StandardLibrary
from lightning_lm.evals import Generation, Likelihood, LocalModel, Prompt
from lightning_lm.evals.tasks import by_name
from lightning_lm.models import GLU, Attention, Layer, TransformerConfig, export_model, load_huggingface
from lightning_lm.tokenizers import BPETokenizer, load_tokenizer

D_MODEL, NUM_LAYERS, NUM_HEADS, HIDDEN, CONTEXT, VOCAB = 384, 6, 6, 1024, 2048, 8192
BATCH_SIZE, NEW_TOKENS = 16, 32
MARK = "<|endoftext|>"
"""Begin of a document in training, which `LocalModel` puts before a text and the tokenizer of transformers does not."""


def export(folder: Path) -> None:
    """Write an untrained Llama of 14M parameters with a tokenizer of Python's sources."""
    texts = itertools.islice(StandardLibrary().documents(), 150)
    tokenizer = BPETokenizer.train(texts, vocab_size=VOCAB)
    layer = Layer(mixer=Attention(num_heads=NUM_HEADS), ffn=GLU(hidden_size=HIDDEN))
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=D_MODEL, num_layers=NUM_LAYERS, layers=layer, context_length=CONTEXT
    )
    export_model(config.build(), folder, tokenizer)


def five_shot(num_items: int) -> list[Likelihood]:
    """Return the choices of items of `docs_choice` behind the same five examples."""
    items = by_name("docs_choice", shots=5).items()[:num_items]
    requests = [request for item in items for request in item.requests if isinstance(request, Likelihood)]
    shots = requests[0].prompt.shots
    return [Likelihood(Prompt(request.prompt.question, shots), request.continuation) for request in requests]


def harness(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=BATCH_SIZE, max_length=CONTEXT)


def likelihoods(model: LocalModel, peer: Any, requests: list[Likelihood]) -> dict[str, Callable[[], list[float]]]:
    from lm_eval.api.instance import Instance

    asked = [
        Instance("loglikelihood", {}, (MARK + request.prompt.text, request.continuation), index)
        for index, request in enumerate(requests)
    ]
    return {
        "lightning_lm": lambda: [answer.logprob for answer in model.log_likelihoods(requests)],
        "lm_eval hf": lambda: [logprob for logprob, _ in peer.loglikelihood(asked, disable_tqdm=True)],
    }


def completions(model: LocalModel, peer: Any, prompts: list[Prompt]) -> dict[str, Callable[[], list[str]]]:
    from lm_eval.api.instance import Instance

    settings = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    asked = [
        Instance("generate_until", {}, (MARK + prompt.text, settings), index) for index, prompt in enumerate(prompts)
    ]
    requests = [Generation(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]
    return {
        "lightning_lm": lambda: [answer.texts[0] for answer in model.generate(requests)],
        "lm_eval hf": lambda: list(peer.generate_until(asked, disable_tqdm=True)),
    }


def measured(ways: dict[str, Callable[[], list[Any]]], rounds: int, distance: Callable[[Any, Any], float]) -> dict:
    """Return the least CPU time of both, the median ratio of the rounds, and the distance of their answers."""
    ours, theirs = (way() for way in ways.values())
    seconds = cpu_seconds(ways, lambda name: ways[name](), rounds)
    pairs = zip(*seconds.values(), strict=True)
    return {
        "best_cpu_s": {name: round(min(times), 2) for name, times in seconds.items()},
        "median_ratio": round(statistics.median(theirs / ours for ours, theirs in pairs), 2),
        "distance": distance(ours, theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(folder)
        model = LocalModel(load_huggingface(folder), load_tokenizer(folder), batch_size=BATCH_SIZE, max_length=CONTEXT)
        peer = harness(folder)
    requests = five_shot(arguments.items)
    prompts = list({request.prompt.text: request.prompt for request in requests}.values())
    results = {
        "likelihoods, 5-shot": measured(
            likelihoods(model, peer, requests),
            arguments.rounds,
            lambda ours, theirs: max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        ),
        f"{NEW_TOKENS} greedy tokens, 5-shot": measured(
            completions(model, peer, prompts),
            arguments.rounds,
            lambda ours, theirs: sum(a.strip() != b.strip() for a, b in zip(ours, theirs, strict=True)) / len(ours),
        ),
    }
    for task, result in results.items():
        print(task, result, flush=True)
    if arguments.output:
        shape = {"items": arguments.items, "batch_size": BATCH_SIZE, "requests": len(requests)}
        write_record(arguments.output, command=" ".join(["python", *sys.argv]), results={**shape, **results})


if __name__ == "__main__":
    main()
