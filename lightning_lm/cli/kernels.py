"""The verb ``lightning-lm kernels``: launch settings measured on the device that is here, and what runs on it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from lightning_lm.cli.numbers import COUNT
from lightning_lm.errors import ConfigurationError, UsageError

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
    tune.add_argument("--tokens", type=COUNT, help="rows that the kernels work on (default: 8192; 8 with --interpret)")
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
    rehearsal, output = namespace.interpret, namespace.output
    if rehearsal:
        _choose_interpreter(namespace.dtype)
    import torch

    from lightning_lm.kernels import force_backend
    from lightning_lm.kernels.runtime.launch_settings import VARIABLE, user_table
    from lightning_lm.kernels.tuning import TUNABLE, Bench, add_to_table, parse_target, tune

    targets = [one for word in namespace.targets or TUNABLE for one in parse_target(word, rehearsal=rehearsal)]
    dtype = getattr(torch, namespace.dtype or ("float32" if rehearsal else "bfloat16"))
    tokens = namespace.tokens or (8 if rehearsal else 8192)
    bench = Bench(torch.device("cpu" if rehearsal else "cuda"), dtype, tokens, rehearsal)
    found, number = [], 0
    with force_backend("triton"):
        _require_kernels(bench.device)
        for operation, dims in targets:
            try:
                found.append(tune(operation, dims, bench))
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                raise ConfigurationError(f"{tokens} rows do not fit: {reason} Use fewer --tokens.") from None
            print(found[-1], flush=True)
            if output is not None or not rehearsal:  # one by one: a run that is cut keeps what it has measured
                number = add_to_table(output or user_table(), found[-1:])
    if rehearsal and output is None:
        print("A rehearsal: nothing is written without --output.")
        return
    read = "Runs read it from now on" if output is None else f"{VARIABLE}={output} lets runs read it"
    faster = sum(one.is_faster for one in found)
    print(f"{output or user_table()}: {faster} of {len(found)} are faster, {number} entries in all. {read}.")


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
