"""The verb ``lightning-lm kernels``: launch settings measured on the device that is here, and what runs on it."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.errors import ConfigurationError, UsageError

if TYPE_CHECKING:
    from lightning_lm.kernels.tuning.targets import Bench
    from lightning_lm.kernels.tuning.tune import Tuned

__all__ = ["add_arguments", "run"]

_DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    verbs = parser.add_subparsers(dest="kernels_verb", required=True, metavar="{tune,report}")
    tune = verbs.add_parser("tune", help="measure launch settings on this GPU, and keep what is faster")
    tune.add_argument(
        "targets",
        nargs="*",
        metavar="KERNEL[:SIZES]",
        help="such as rms_norm:1024,4096 or rope:32x8x128 (default: all)",
    )
    tune.add_argument("--dtype", choices=_DTYPES, help="default: bfloat16; float32 with --interpret")
    tune.add_argument("--tokens", type=int, help="rows that the kernels work on (default: 8192; 8 with --interpret)")
    tune.add_argument("--output", type=Path, metavar="FILE", help="the table (default: the one in your cache folder)")
    tune.add_argument(
        "--interpret", action="store_true", help="a rehearsal without a GPU: few candidates, times mean nothing"
    )
    verbs.add_parser("report", help="print what runs each operation here, and the tables of launch settings")


def run(namespace: argparse.Namespace) -> None:
    """Carry out the verb.

    Args:
        namespace: Parsed arguments of `add_arguments`.

    Raises:
        UsageError: If a kernel or its sizes are unknown.
        ConfigurationError: If no kernel can run here.
    """
    if namespace.kernels_verb == "report":
        _report()
    else:
        _tune(namespace)


def _tune(namespace: argparse.Namespace) -> None:
    if namespace.interpret:
        _choose_interpreter(namespace.dtype)
    import torch

    from lightning_lm.kernels import force_backend
    from lightning_lm.kernels.runtime.launch_settings import VARIABLE, user_table
    from lightning_lm.kernels.tuning.targets import TUNABLE, Bench
    from lightning_lm.kernels.tuning.tune import Effort, add_to_table, candidates, parse_target, tune

    words, rehearsal = namespace.targets or TUNABLE, namespace.interpret
    targets = [target for word in words for target in parse_target(word, rehearsal=rehearsal)]
    device = torch.device("cpu" if namespace.interpret else "cuda")
    dtype = getattr(torch, namespace.dtype or ("float32" if namespace.interpret else "bfloat16"))
    bench = Bench(device=device, dtype=dtype, tokens=namespace.tokens or (8 if namespace.interpret else 8192))
    effort = Effort(repetitions=1, finalists=2, rounds=1, most=3) if namespace.interpret else Effort()
    with force_backend("triton"):
        _require_kernels(device)
        with _progress(sum(len(candidates(target, dtype, effort)) for target in targets)) as advance, _memory(bench):
            found = [tune(target, bench, effort=effort, advance=advance(str(target))) for target in targets]
    print(_table(found))
    output = namespace.output or (None if namespace.interpret else user_table())
    if output is None:
        print("A rehearsal: nothing is written without --output.")
        return
    number = add_to_table(output, found, bench)
    faster = sum(one.is_faster for one in found)
    read = "It is read from the next run on" if output == user_table() else f"{VARIABLE}={output} lets runs read it"
    print(f"{output}: {faster} of {len(found)} targets are faster, {number} entries in all. {read}.")


def _choose_interpreter(dtype: str | None) -> None:
    """Let Triton interpret kernels, which must be said before it is loaded."""
    if dtype == "bfloat16":
        raise UsageError("--interpret computes bfloat16 wrongly; use --dtype float32 or float16.")
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError("Triton is loaded already; set TRITON_INTERPRET=1 in the environment for --interpret.")
    os.environ["TRITON_INTERPRET"] = "1"


def _require_kernels(device: Any) -> None:
    import torch

    from lightning_lm.kernels import unavailable

    reason = (
        unavailable(device) if device.type == "cpu" or torch.cuda.is_available() else "this machine has no CUDA device"
    )
    if reason is not None:
        raise ConfigurationError(
            f"Kernels cannot be tuned here: {reason}. Tune on the machine that will train; --interpret rehearses."
        )


@contextmanager
def _memory(bench: "Bench") -> Iterator[None]:
    """Say what to change where the work to time does not fit."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{bench.tokens} rows do not fit: {reason} Take fewer --tokens.") from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], Callable[[], None]]]:
    """Show how many candidates are measured, on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)

        def describe(text: str) -> Callable[[], None]:
            bar.update(task, description=text)
            return lambda: bar.advance(task)

        yield describe


def _table(found: "Sequence[Tuned]") -> str:
    rows = [("kernel", "before", "us", "after", "us", "after/before", "tried")]
    for one in found:
        after = " ".join(f"{name}={size}" for name, size in one.after.items() if one.before.get(name) != size)
        before = " ".join(f"{name}={size}" for name, size in one.before.items())
        tried = f"{one.tried}" + (f", {one.failed} failed" if one.failed else "")
        times = f"{one.before_us:.1f}", f"{one.after_us:.1f}"
        rows.append((str(one.target), before, times[0], after or "the same", times[1], f"{one.ratio:.2f}", tried))
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _report() -> None:
    import torch

    from lightning_lm import kernels
    from lightning_lm.kernels.runtime.launch import triton_version
    from lightning_lm.kernels.runtime.launch_settings import device_name, sources, user_table

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.report(device)
    place = device_name(device) if device.type == "cuda" else "no GPU"
    print(f"\nTables of launch settings, for {place} and Triton {triton_version() or '(not installed)'}:")
    for source in sources():
        here = sum(entry.device == device_name(device) for entry in source.entries)
        print(f"  {source.path}: {source.problem or f'{here} of {len(source.entries)} entries are for this device'}")
    if not user_table().is_file():
        print(f"  {user_table()}: not there; `lightning-lm kernels tune` writes it")
