"""`lightning-lm consolidate`: the checkpoint of a sharded run, as one file."""

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("folder", type=Path, help="what a sharded run saved, such as runs/.../step=1000.ckpt")
    parser.add_argument("--output", type=Path, help="the file to write; by default beside the folder, ending in .ckpt")


def run(arguments: argparse.Namespace) -> int:
    """Write the file and say where it is."""
    folder: Path = arguments.folder
    output: Path = arguments.output or folder.with_name(f"{folder.name.removesuffix('.ckpt')}.whole.ckpt")
    from lightning_lm.strategies.checkpoints.atomic import consolidate

    consolidate(folder, output)
    print(f"{output} ({output.stat().st_size / 2**20:.1f} MiB)")
    return 0
