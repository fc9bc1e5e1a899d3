"""Mixers beside each other after ``lightning-lm sweep --config architectures/compare``: loss, decoding speed, state.

    python tests/benchmarks/bench_architectures.py LEDGER --output tests/benchmarks/results

Losses come from the ledger, as the mean over seeds. CPU time of training and of decoding, and the bytes of the state,
are measured here with the same models: one thread, the models take turns, the best round counts. Writes
``architectures.json`` and ``architectures.svg``.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import write_record
from torch import Tensor

from lightning_lm.models import Transformer, TransformerConfig
from lightning_lm.scaling import RunLedger
from lightning_lm.scaling.plots.canvas import INK, new_figure, plain

CONTEXT, ROWS = 256, 8


Layers = dict[str, Any] | list[dict[str, Any]]
"""The layer of a model, or the layers that are cycled over its depth."""


def name_of(layers: Layers) -> str:
    """Return the names of the layers' mixers, and of feed-forwards that are not dense."""
    if isinstance(layers, list):
        return ", ".join(name_of(layer) for layer in layers)
    mixer, ffn = layers["mixer"], layers["ffn"]["class_path"]
    settings = mixer.get("init_args", {})
    chosen = [str(settings[key]) for key in ("decay", "cell") if settings.get(key)]
    return " + ".join([mixer["class_path"], *chosen, *([] if ffn == "GLU" else [ffn])])


def tensors_of(value: object) -> Iterator[Tensor]:
    """Yield the tensors that an object holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(list(vars(value).values()))


def build(layers: Layers) -> Transformer:
    """Return the model of a run, with new weights."""
    described = [
        {"part": "Layer", "mixer": _part(layer["mixer"]), "ffn": _part(layer["ffn"])}
        for layer in (layers if isinstance(layers, list) else [layers])
    ]
    plain_config = TransformerConfig(vocab_size=256, d_model=64, num_layers=2, context_length=CONTEXT).to_dict()
    return TransformerConfig.from_dict({**plain_config, "layers": described}).build()


def _part(data: dict[str, Any]) -> dict[str, Any]:
    settings = data.get("init_args", {})
    return {"part": data["class_path"], **{key: _nested(key, value) for key, value in settings.items()}}


def _nested(key: str, value: Any) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return _part(value)
    return {"part": value} if key == "decay" else value


def training_step(model: Transformer) -> Callable[[], None]:
    """Return a forward and a backward pass over a batch."""
    tokens = torch.randint(256, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

    return step


def measure(models: dict[str, Transformer], rounds: int) -> dict[str, dict[str, float]]:
    """Return CPU ms of a training step and of a token, and bytes of the state of a row."""
    steps = {name: training_step(model) for name, model in models.items()}
    found: dict[str, dict[str, float]] = {name: {"step_cpu_ms": float("inf")} for name in models}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name]["step_cpu_ms"] = min(found[name]["step_cpu_ms"], 1e3 * _seconds(step))
    for name, model in models.items():
        model.eval()
        found[name] |= decoding(model, rounds)
    return {name: {key: round(value, 3) for key, value in row.items()} for name, row in found.items()}


@torch.inference_mode()
def decoding(model: Transformer, rounds: int) -> dict[str, float]:
    """Return the time of a token after 200 others, and the size of the state there."""
    best, token = float("inf"), torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(rounds):
        cache = model.make_cache(1, CONTEXT)
        model(torch.zeros(1, 200, dtype=torch.int64), cache=cache)
        held = {id(x): x for layer in cache.layers for x in tensors_of(layer)}
        seconds = _seconds(lambda cache=cache: [model(token, cache=cache) for _ in range(40)])
        best = min(best, seconds / 40)
    return {"token_cpu_ms": 1e3 * best, "state_bytes": sum(x.nbytes for x in held.values())}


def _seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the four columns side by side, the best loss on top."""
    figure = new_figure(11, 0.45 * len(rows) + 1.2)
    panels = figure.subplots(1, 4, sharey=True)
    columns = {
        "loss": "Loss, nats a byte",
        "step_cpu_ms": "Step, CPU ms",
        "token_cpu_ms": "Token, CPU ms",
        "state_bytes": "State, bytes",
    }
    names = list(rows)[::-1]
    for axes, (key, title) in zip(panels, columns.items(), strict=True):
        values = [rows[name][key] for name in names]
        axes.plot(values, names, "o", color=INK)
        if key == "loss":
            for name in names:
                axes.plot(rows[name]["losses"], [name] * len(rows[name]["losses"]), "|", color="#9ca3af")
        else:
            axes.set_xlim(left=0)
        plain(axes, title)
    figure.savefig(path)


def main() -> None:
    """Read the ledger, measure, and write the record and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder of the record and the figure")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    losses: dict[str, list[float]] = {}
    layers: dict[str, dict[str, Any]] = {}
    for record in RunLedger(args.ledger).read():
        if record.finished:
            layer = record.hyper_parameters["model.model.layers"]
            layers[name_of(layer)] = layer
            losses.setdefault(name_of(layer), []).append(record.loss)
    models = {name: build(layer) for name, layer in layers.items()}
    measured = measure(models, args.rounds)
    rows = {
        name: {
            "loss": round(statistics.mean(found), 4),
            "losses": [round(loss, 4) for loss in found],
            "parameters": sum(parameter.numel() for parameter in models[name].parameters()),
            **measured[name],
        }
        for name, found in sorted(losses.items(), key=lambda item: statistics.mean(item[1]))
    }
    for name, row in rows.items():
        print(f"{name:32s} {row}")
    args.output.mkdir(parents=True, exist_ok=True)
    draw(rows, args.output / "architectures.svg")
    write_record(args.output / "architectures.json", command=shlex.join(["python", *sys.argv]), results=rows)


if __name__ == "__main__":
    main()
