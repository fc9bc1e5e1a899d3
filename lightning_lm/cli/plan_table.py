"""The tables that ``lightning-lm plan`` prints: readable from 80 columns on."""

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lightning_lm.callbacks.formatting import short

if TYPE_CHECKING:
    from lightning_lm.cli.plan_strategies import Candidate, Cluster, Planner

__all__ = ["memory_table", "reasons", "speed_table", "summary"]

_COLUMNS = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer_states": "optim.",
    "activations": "activ.",
    "logits": "logits",
    "buffers": "buffers",
}


def summary(planner: "Planner") -> str:
    """Return the lines above the tables: model, GPUs and batch.

    Args:
        planner: Has all three.
    """
    module, cluster, batch = planner.line.module, planner.cluster, planner.batch
    parameters = list(planner.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in parameters)
    part = "" if trained == whole else f", {trained / whole:.2%} of them trained"
    others = sum(parameter.numel() for parameter in module.parameters()) - whole
    reference = f", and {_count(others)} more beside it" if others > whole / 2 else ""
    nodes = cluster.gpus // cluster.gpus_per_node
    tokens = batch.examples * planner.objective.rows_per_example * batch.context_length
    return (
        f"{type(module).__name__} of {_count(whole)} parameters{part}{reference}, in {planner.precision}\n"
        f"{cluster.gpus} {cluster.gpu.name} on {nodes} machine{'s' if nodes > 1 else ''}; a step is {batch.examples} "
        f"examples of {batch.context_length:,} tokens, {short(tokens)} tokens in all"
    )


def memory_table(candidates: "list[Candidate]", cluster: "Cluster") -> Table:
    """Return the memory of one GPU under each strategy; those that do not fit are crossed out.

    Args:
        candidates: Strategies.
        cluster: GPUs of the run.
    """
    largest = max((one.memory.total for one in candidates if one.memory), default=0.0)
    name, unit = ("GiB", 2**30) if largest >= 4 * 2**30 else ("MiB", 2**20)
    table = Table(title=f"Memory per GPU, {name} (usable: {cluster.usable_bytes / unit:,.1f})", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for label in (*_COLUMNS.values(), "all"):
        table.add_column(label, justify="right", no_wrap=True)
    for candidate in candidates:
        memory = candidate.memory
        sizes = [getattr(memory, column) for column in _COLUMNS] + [memory.total] if memory else [None] * 7
        cells = ["-" if size is None else _number(size / unit) for size in sizes]
        table.add_row(*_crossed_out(candidate, [candidate.name, *cells]))
    return table


def speed_table(candidates: "list[Candidate]") -> Table:
    """Return the communication and speed of a step under each strategy.

    Args:
        candidates: Strategies.
    """
    longest = max((one.time.step_s for one in candidates if one.time), default=0.0)
    unit, scale = ("s", 1.0) if longest >= 1 else ("ms", 1e3)
    title = f"Each optimizer step: GB that a GPU sends, and times in {unit}"
    table = Table(title=title, title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for label in ("rows", "GB", "sending", "waiting", "step", "MFU", "tokens/s"):
        table.add_column(label, justify="right", no_wrap=True)
    for candidate in candidates:
        time = candidate.time
        if time is None:
            table.add_row(*_crossed_out(candidate, [candidate.name, *"-------"]))
            continue
        rows = f"{candidate.micro_batch} x {candidate.micro_batches}"
        sent = sum(one.sent_bytes for one in candidate.exchanged) / 1e9
        times = [_number(scale * value) for value in (time.communication_s, time.exposed_s, time.step_s)]
        cells = [candidate.name, rows, _number(sent), *times, f"{time.mfu:.1%}", short(time.tokens_per_s)]
        table.add_row(*_crossed_out(candidate, cells))
    return table


def reasons(candidates: "list[Candidate]") -> str:
    """Return one line for each strategy that cannot be used.

    Args:
        candidates: Strategies.
    """
    return "".join(f"x {one.name}: {one.reason}\n" for one in candidates if one.reason)


def _crossed_out(candidate: "Candidate", cells: list[str]) -> list[Text]:
    """Return the cells of a row; one that cannot be used is struck through, and marked where that does not show."""
    style = "strike dim" if candidate.reason else ""
    mark = "x " if candidate.reason else ""
    return [Text(mark + cells[0], style), *(Text(cell, style) for cell in cells[1:])]


def _count(parameters: int) -> str:
    return short(parameters).replace("G", "B")  # billions, as models are named


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 0.1 or not value else f"{value:.2g}"
