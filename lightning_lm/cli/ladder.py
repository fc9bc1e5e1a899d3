"""The ladder of language models: n-gram, Bengio's network, RNN, GRU, LSTM, Transformer, on the same text.

One table: the history of the field in bits per byte. Every network gets the same tokens, width, optimizer and schedule;
none is tuned, so the ranking is one of this budget. The n-gram model reads all of the training text once.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.cli.sweep import quiet
from lightning_lm.storage import replacing

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_lm.datamodules import TextDataModule
    from lightning_lm.models import Layer

__all__ = ["Rung", "climb", "ladder_table", "save_ladder_figure"]

_ORDER, _VOCAB_SIZE, _D_MODEL, _CONTEXT, _BATCH = 5, 1024, 128, 128, 16


@dataclass(frozen=True)
class Rung:
    """Result of one model.

    Args:
        name: Name of the model.
        year: Year of its paper.
        size: Parameters of a network, n-grams of a table.
        tokens: Training tokens that it has read.
        cpu_s: CPU time of the training, in seconds.
        bits_per_byte: Cost of the validation text.
    """

    name: str
    year: int
    size: int
    tokens: int
    cpu_s: float
    bits_per_byte: float


def climb(output: Path, source: Any, *, steps: int, seed: int) -> list[Rung]:
    """Train each model, write table and figure, and return the results.

    Args:
        output: Folder of ``ladder.json`` and ``ladder.png``.
        source: Text, as `TextDataModule` takes it.
        steps: Optimizer steps of each network, of 2,048 tokens.
        seed: Seed of weights and rows.
    """
    from rich.console import Console

    rungs = []
    with quiet():
        for rung in _rungs(source, steps, seed):
            print(f"{rung.name}: {rung.bits_per_byte:.3f} bits per byte, {rung.cpu_s:.0f} CPU-seconds", flush=True)
            rungs.append(rung)
    rungs.sort(key=lambda rung: rung.bits_per_byte)
    with replacing(output / "ladder.json") as file:
        file.write(json.dumps([asdict(rung) for rung in rungs], indent=1).encode())
    save_ladder_figure(rungs, output / "ladder.png")
    Console().print(ladder_table(rungs))
    print(f"Results: {output / 'ladder.json'}\nFigure: {output / 'ladder.png'}")
    return rungs


def ladder_table(rungs: list[Rung]) -> "Table":
    """Return a table, the best model first.

    Args:
        rungs: The results.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for name in ("year", "parameters", "tokens", "CPU-s", "bits per byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for rung in rungs:
        cells = str(rung.year), f"{rung.size:,}", f"{rung.tokens:,}", f"{rung.cpu_s:.0f}", f"{rung.bits_per_byte:.3f}"
        table.add_row(rung.name, *cells)
    return table


def save_ladder_figure(rungs: list[Rung], path: Path) -> None:
    """Draw bits per byte as bars, in the order of the years.

    Args:
        rungs: The results.
        path: PNG file.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    from lightning_lm.scaling.plots.canvas import INK, label, new_figure, plain

    ordered = sorted(rungs, key=lambda rung: rung.year)
    figure = new_figure(7.0, 1.4 + 0.4 * len(ordered))
    axes = figure.add_subplot()
    plain(axes, "Bits per byte of the same text, less is better")
    axes.barh(range(len(ordered)), [rung.bits_per_byte for rung in ordered], color="#2563eb", height=0.6)
    for place, rung in enumerate(ordered):
        text = f"{rung.bits_per_byte:.3f}  ({rung.cpu_s:.0f} CPU-s)"
        label(axes, text, (rung.bits_per_byte, place), INK, shift=(4, 0))
    axes.set_yticks(range(len(ordered)), [f"{rung.name}, {rung.year}" for rung in ordered])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _rungs(source: Any, steps: int, seed: int) -> Iterator[Rung]:
    from lightning_lm.datamodules import TextDataModule
    from lightning_lm.models import GLU, Attention, Layer, Recurrent, WindowMLP
    from lightning_lm.tokenizers import TrainBPE

    data = TextDataModule(
        source, tokenizer=TrainBPE(vocab_size=_VOCAB_SIZE), context_length=_CONTEXT, batch_size=_BATCH, seed=seed
    )
    data.prepare_data()
    yield _ngram(data)
    layers: dict[tuple[str, int], tuple[Layer, int]] = {
        ("feed-forward (Bengio)", 2003): (Layer(mixer=WindowMLP(order=_ORDER), ffn=None), 1),
        ("RNN", 2010): (Layer(mixer=Recurrent(cell="rnn"), ffn=None), 2),
        ("LSTM", 2014): (Layer(mixer=Recurrent(cell="lstm"), ffn=None), 2),
        ("GRU", 2015): (Layer(mixer=Recurrent(cell="gru"), ffn=None), 2),
        ("Transformer", 2017): (Layer(mixer=Attention(num_heads=4), ffn=GLU()), 2),
    }
    for (name, year), (layer, num_layers) in layers.items():
        yield _network(name, year, layer, num_layers, data, steps, seed)


def _ngram(data: "TextDataModule") -> Rung:
    from lightning_lm.evals import evaluate_ngram
    from lightning_lm.models import fit_ngram

    assert data.tokenizer is not None
    parts = list(data.train_documents())
    begin_s = time.process_time()
    model = fit_ngram(parts, order=_ORDER, vocab_size=data.tokenizer.vocab_size)
    cpu_s = time.process_time() - begin_s
    score = evaluate_ngram(model, data.validation_texts(), data.tokenizer)
    tokens = sum(len(ids) for ids, _ in parts)
    return Rung(f"{_ORDER}-gram (Kneser-Ney)", 1998, sum(model.num_ngrams), tokens, cpu_s, score.bits_per_byte)


def _network(
    name: str, year: int, layer: "Layer", num_layers: int, data: "TextDataModule", steps: int, seed: int
) -> Rung:
    from lightning.pytorch import Trainer, seed_everything

    from lightning_lm.callbacks import LMProgressBar
    from lightning_lm.evals import evaluate_perplexity
    from lightning_lm.models import TransformerConfig
    from lightning_lm.modules import PretrainModule
    from lightning_lm.optim import WSD, AdamW, Muon

    seed_everything(seed, verbose=False)
    config = TransformerConfig(d_model=_D_MODEL, num_layers=num_layers, layers=layer, context_length=_CONTEXT)
    module = PretrainModule(config, optimizer=Muon(lr=0.02, adamw=AdamW(lr=3e-3)), schedule=WSD(warmup=0.02, decay=0.4))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[LMProgressBar()],
    )
    begin_s = time.process_time()
    trainer.fit(module, datamodule=data)
    cpu_s = time.process_time() - begin_s
    assert data.tokenizer is not None
    lengths = data.tokenizer.token_byte_lengths()
    model: Any = module.model
    score = evaluate_perplexity(model, data.val_dataloader(), token_bytes=lengths)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Rung(name, year, parameters, steps * _BATCH * _CONTEXT, cpu_s, score.bits_per_byte)
